"""DeepSpeed as it is installed, and the section of a preset that goes through to it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import PresetError, UserError
from core.parallel.engines import check_engine
from core.preset.decode import decode_preset
from core.preset.train import TrainSettings
from core.registry import Preset
from tests.project import Project, tiny_preset

ENGINE = {"engine": "deepspeed"}


def zero(**section: Any) -> dict:
    return {**ENGINE, "deepspeed": {"zero_optimization": section}}


def settings(train: dict) -> TrainSettings:
    return TrainSettings.model_validate(train)


def check(train: TrainSettings) -> None:
    check_engine(train.engine, train.deepspeed_config, 1)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (zero(stage=4), "stage is 0, 1, 2 or 3, not 4"),
        (zero(stage=True), "stage is 0, 1, 2 or 3, not True"),
        (zero(stage=2, offload_optimizer={"device": "cpu"}), "offload_optimizer is not supported"),
        (zero(round_robin_gradients=True), "round_robin_gradients is not supported"),
        (zero(stage=3, zero_hpz_partition_size=2), "zero_hpz_partition_size is not supported"),
        (ENGINE | {"deepspeed": {"bf16": {"enabled": True}}}, "bf16 is set by train.precision"),
        (
            ENGINE | {"deepspeed": {"gradient_clipping": 1.0}},
            "gradient_clipping is set by train.max_grad_norm",
        ),
        (ENGINE | {"deepspeed": {"zero_optimisation": {}}}, '"zero_optimization"'),
        ({"deepspeed": {}}, 'the section deepspeed goes with engine "deepspeed"'),
        (ENGINE | {"optimizer": "muon"}, 'optimizer "muon" does not go with ZeRO stages 1 to 3'),
        (zero(stage=3) | {"compile": "always"}, 'compile "always" does not go with engine deepsp'),
        (zero(stage=3) | {"curriculum": {}}, "curriculum does not go with ZeRO stage 3"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(train: dict, told: str) -> None:
    with pytest.raises(PresetError) as raised:
        decode_preset(tiny_preset(train=train), Preset, "t", "t")
    assert told in str(raised.value)


def test_what_others_have_written_is_taken() -> None:
    """A section made for other trainers: what they fill in themselves is left to us."""
    train = settings(zero(stage=3, reduce_bucket_size="auto", overlap_comm=False))
    assert train.deepspeed is not None and train.zero_stage == 3
    assert train.deepspeed.zero_optimization == {"stage": 3, "overlap_comm": False}
    assert settings(ENGINE).zero_stage == 2
    assert settings(ENGINE | {"optimizer": "muon"} | zero(stage=0)).zero_stage == 0


def test_a_key_that_deepspeed_does_not_know_is_named() -> None:
    with pytest.raises(UserError, match=r"overlap_com: .*did you mean \"overlap_comm\""):
        check(settings(zero(stage=1, overlap_com=True)))
    with pytest.raises(UserError, match=r"reduce_bucket_size: DeepSpeed says: "):
        check(settings(zero(stage=1, reduce_bucket_size="large")))


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"package .* is missing: pip install 'deepspeed>=0.19,<0."):
        check(settings(ENGINE))


def test_another_version_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("core.parallel.deepspeed.version", lambda name: "0.20.1")
    with pytest.raises(UserError, match=r"needs version 0\.19 of DeepSpeed, and 0\.20\.1 is inst"):
        check(settings(ENGINE))


@pytest.mark.slow
def test_one_process_trains_and_nothing_is_built(
    tmp_path: Path, make_project: Callable[..., Project]
) -> None:
    """Also where a build that was broken off has left its lock, on which DeepSpeed waits."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    project = make_project({"t": tiny_preset(train=ENGINE | {"max_steps": 5})})
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "HOME": str(tmp_path)}
    result = project.run("t", **variables)
    assert result.code == 0 and project.finished(), result.text
    assert "ZeRO stage 2" in result.text and "Traceback" not in result.text
    assert "WARNING" not in result.text and "Warning" not in result.text, result.text
    assert project.events("run_start")[0]["engine"] == "deepspeed"
    assert [path.name for path in (tmp_path / "extensions").rglob("*") if path.is_file()] == [
        "lock"
    ]
