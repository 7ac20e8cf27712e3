"""Training from the Hub, from the outside: `main.py` in a copy of the project, against a hub on
loopback that has its faults."""

import functools
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, lines, parquet
from tests.project import ROOT, Project, Result, kill_group, merged, story

WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en/train")
OPENWEBTEXT = ("Skylion007/openwebtext", "plain_text/train")
CARD = b"---\nconfigs:\n- config_name: 20231101.en\n  data_files: 20231101.en/*.parquet\n---\n"
RIGHT, WRONG, OTHER = (
    "hf_theRightTokenOfMine00",
    "hf_theWrongTokenOfMine00",
    "hf_theTokenWithoutAccess",
)

TINY: dict = {
    "lineage": "t",
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32},
    "tokenizer": {"type": "byte"},
    "train": {
        "per_gpu_batch_size": 20,
        "accumulation_steps": 1,
        "max_steps": 40,
        "eval_tokens": 200,
    },
    "generate": {"prompts": ["The "], "max_tokens": 4},
}
"""What makes a run take seconds."""


LARGER = merged(
    TINY,
    {
        "model": {"seq_length": 128},
        "tokenizer": {"type": "bpe", "vocab_size": 300},
        "train": {"per_gpu_batch_size": 16, "max_steps": 300},
    },
)


def streamed(*sources: Any, **changes: Any) -> dict:
    """A tiny preset over these sources; a string is a repository."""
    sections = [
        {"type": "hf", "dataset": s, "name": s.split("/")[-1]} if isinstance(s, str) else s
        for s in sources
    ]
    return merged({**TINY, "data": {"sources": sections, "lanes": 4}}, changes)


def texts(first: int, count: int) -> list[dict]:
    return [{"id": str(i), "text": story(i, sentences=2)} for i in range(first, first + count)]


@functools.cache
def files_of(number: int, file: str) -> dict[str, bytes]:
    """60 small files of a repository, so that reading on means asking again."""
    names = [f"{file}-{k:05}-of-00060.parquet" for k in range(60)]
    return {
        name: parquet(texts(10_000 * number + 20 * k, 20), row_group_size=7)
        for k, name in enumerate(names)
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The two repositories of 00_best_general and one more."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as hub:
        for number, (repo, file) in enumerate(
            [WIKIPEDIA, OPENWEBTEXT, ("me/stories", "data/train")]
        ):
            hub.add_dataset(
                repo, files_of(number, file) | ({"README.md": CARD} if number == 0 else {})
            )
        yield hub


def env(hub: Hub, project: Project) -> dict[str, str]:
    """What main.py must know: this hub, and a cache that nothing else has filled."""
    kept = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "NO_PROXY")
    return {key: value for key, value in hub.env(project.folder / "hf_home").items() if key in kept}


def run(hub: Hub, project: Project, preset: str = "t", **more: str) -> Result:
    result = project.run(preset, **env(hub, project), **more)
    assert "Traceback" not in result.text, result.text
    return result


def run_and(
    hub: Hub,
    project: Project,
    after_steps: int,
    then: Callable[[], Any],
    preset: str = "t",
    **more: str,
) -> Result:
    """A run in the middle of which something happens to the hub."""
    steps = project.num_steps() + after_steps
    process = project.start(preset, **env(hub, project), **more)
    try:
        end = time.monotonic() + 120
        while project.num_steps() < steps and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        then()
        out, err = process.communicate(timeout=240)
    finally:
        kill_group(process)
    assert "Traceback" not in out + err, out + err
    return Result(process.returncode, out, err)


def warnings(project: Project) -> list[str]:
    return [event["message"] for event in project.events("warning")]


# a source that goes, and comes back ---------------------------------------------------------------


@pytest.mark.slow
def test_the_default_preset_outlives_a_source_and_takes_it_up_again(
    make_project: Callable[..., Project], hub: Hub
) -> None:
    """00_best_general as it is shipped, on a smaller model: one repository vanishes in mid-run, and
    is there in the next run."""
    project = make_project({"t": merged(LARGER, {"extends": "00_best_general"})})
    shutil.copy2(ROOT / "configs" / "00_best_general.json", project.folder / "configs")
    gone = {}

    def vanish() -> None:
        gone["datasets", OPENWEBTEXT[0]] = hub.repos.pop(("datasets", OPENWEBTEXT[0]))

    result = run_and(hub, project, 60, vanish)
    assert result.code == 0, result.text
    (told,) = [text for text in warnings(project) if text.startswith("source openwebtext")]
    assert (
        "dropped" in told
        and "not on the Hub, or is private" in told
        and told in " ".join(result.out.split())
    )
    steps = project.events("step")
    assert len(steps) == 300 and project.events()[-1]["reason"] == "max_steps"
    before, after = (
        {name: s["weight"] for name, s in step["sources"].items()} for step in (steps[0], steps[-1])
    )
    assert before == pytest.approx(
        {"wikipedia": 0.55 / 0.95, "openwebtext": 0.35 / 0.95, "python_stdlib": 0.05 / 0.95}
    )
    assert after == pytest.approx(
        {"wikipedia": 0.55 / 0.6, "openwebtext": 0.0, "python_stdlib": 0.05 / 0.6}
    )
    first = project.checkpoint()["data"]
    assert (
        set(first["drops"]) == {"openwebtext"}
        and first["snapshot"]["cursors"]["openwebtext"]["unit"] > 0
    )

    hub.repos.update(gone)
    result = run(hub, project)
    assert result.code == 0 and len(project.events("step")) == 600, result.text
    assert "openwebtext" in result.out and "goes on where it was" in result.out
    steps = project.events("step")
    assert steps[-1]["sources"]["openwebtext"]["weight"] == pytest.approx(0.35 / 0.95)
    assert (
        steps[-1]["sources"]["openwebtext"]["tokens"]
        > steps[299]["sources"]["openwebtext"]["tokens"]
    )
    second = project.checkpoint()["data"]
    cursors = [
        (c["epoch"], c["unit"])
        for c in (d["snapshot"]["cursors"]["openwebtext"] for d in (first, second))
    ]
    assert second["drops"] == {} and cursors[1] > cursors[0]


@pytest.mark.slow
def test_when_every_source_fails_the_run_is_saved_and_ends_with_3(
    make_project: Callable[..., Project], hub: Hub
) -> None:
    """No text in their place: the weights are kept, both reasons are told, and another start goes
    on."""
    project = make_project({"t": streamed("me/stories", OPENWEBTEXT[0], train={"max_steps": 2000})})
    repos = dict(hub.repos)
    result = run_and(hub, project, 20, hub.repos.clear)
    assert result.code == 3, result.text
    assert "no source is left to read from" in result.err and "not on the Hub" in result.err
    end = project.events()[-1]
    assert end["event"] == "run_end" and end["reason"] == "no_data" and 20 < end["step"] < 6000
    assert len([text for text in warnings(project) if "dropped" in text]) == 2
    saved = project.checkpoint()
    assert saved["progress"]["step"] == end["step"] and not saved["progress"]["finished"]
    hub.repos.update(repos)
    project.write_preset(
        "t", streamed("me/stories", OPENWEBTEXT[0], train={"max_steps": end["step"] + 20})
    )
    result = run(hub, project)
    assert result.code == 0 and project.steps() == list(range(1, end["step"] + 21)), result.text


@pytest.mark.slow
def test_passing_trouble_changes_nothing(make_project: Callable[..., Project], hub: Hub) -> None:
    """Too many requests, a cut line, a silent one, a failing server: the same data in the same
    order, and nothing dropped; with and without workers."""
    preset = streamed("me/stories", OPENWEBTEXT[0], train={"max_steps": 400})
    quiet = make_project({"t": preset}, "quiet")
    assert run(hub, quiet).code == 0
    one, faults = quiet.checkpoint(), []

    def trouble() -> None:
        faults.append(
            hub.fail("me/stories", status=429, headers={"Retry-After": "1"}, times=2, method="GET")
        )
        faults.append(
            hub.fail("Skylion007/openwebtext/resolve", drop_after=100, times=3, method="GET")
        )
        faults.append(
            hub.fail("me/stories/resolve", stall_after=100, skip=1, times=1, method="GET")
        )
        faults.append(hub.fail("Skylion007", status=502, skip=1, times=2))

    for workers in (0, 2):
        faults.clear()
        troubled = make_project(
            {"t": merged(preset, {"data": {"workers": workers}})}, f"troubled{workers}"
        )
        result = run_and(hub, troubled, 8, trouble, HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert result.code == 0, result.text
        assert [fault.seen for fault in faults] == [2, 3, 1, 2] and warnings(troubled) == []
        other = troubled.checkpoint()
        assert (
            one["data"]["receipt"] == other["data"]["receipt"]
            and one["data"]["drops"] == other["data"]["drops"] == {}
        )
        assert [e["loss"] for e in quiet.events("step")] == [
            e["loss"] for e in troubled.events("step")
        ]


@pytest.mark.slow
def test_a_gated_dataset_without_a_token_says_what_to_do(
    make_project: Callable[..., Project], hub: Hub
) -> None:
    hub.repos["datasets", "me/stories"].gated = True
    project = make_project({"t": streamed("me/stories")})
    result = run(hub, project)
    assert result.code == 3, result.text
    message = " ".join(result.err.split())
    for part in (
        f"open {hub.url}/datasets/me/stories",
        f"{hub.url}/settings/tokens",
        "read access",
        "HF_TOKEN=",
        ".env",
    ):
        assert part in message, message


@pytest.mark.slow
def test_no_token_is_ever_written(make_project: Callable[..., Project], hub: Hub) -> None:
    """A wrong token, one without access and the right one, from .env or the environment: what each
    leads to; none in any file."""
    hub.repos["datasets", "me/stories"].gated = True
    hub.tokens |= {RIGHT: {"me/stories"}, OTHER: set()}
    wandb = importlib.util.find_spec("wandb") is not None
    wandb_key = "c0ffee6789abcdef0123456789abcdef01234567"
    local = {"type": "text", "path": "texts"}
    project = make_project(
        {"t": streamed("me/stories", local, logging={"wandb": True}, data={"workers": 1})}
    )
    said, refused, no_access = "", "the Hub refused your token", "your token has no access"
    for where, token, told in (
        ("file", WRONG, refused),
        ("environment", OTHER, no_access),
        ("environment", RIGHT, ""),
        ("environment", WRONG, refused),
        ("file", RIGHT, ""),
    ):
        given = {}
        if where == "file":
            (project.folder / ".env").write_text(
                f"# keys\nexport HF_TOKEN='{token}'\nWANDB_API_KEY={wandb_key}\n{token}\n"
                "OMP_NUM_THREADS=7\n"
            )
        else:
            (project.folder / ".env").write_text(f"HF_TOKEN={RIGHT if token == WRONG else WRONG}\n")
            given = {"HF_TOKEN": token, "WANDB_API_KEY": wandb_key}
        result = run(hub, project, WANDB_MODE="offline", **given)
        assert result.code == 0, result.text
        if told:
            assert told in warnings(project)[-1]
        else:
            assert set(project.events("step")[-1]["sources"]) == {"stories", "texts"}
        assert (".env: line 4 is passed over" in result.err) == (
            where == "file"
        ) and "(1 threads)" in result.out
        said += result.text
    (project.folder / ".env").unlink()
    secrets = [RIGHT, WRONG, OTHER, wandb_key]
    assert not [secret for secret in secrets if secret in said]
    files = [path for path in project.folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".pth"] and (
        not wandb or [path for path in files if "wandb" in path.parts]
    )
    found = [
        (path.name, secret)
        for path in files
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]
    assert found == []


# other things of the Hub --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tokenizer_from_the_hub(make_project: Callable[..., Project], hub: Hub) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    end = AddedToken("<|endoftext|>", special=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([story(1)], trainer)
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    files = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    hub.add_model("me/tiny-gpt2", {**files, "config.json": b'{"model_type": "gpt2"}'})
    project = make_project(
        {
            "t": streamed(
                "me/stories",
                tokenizer={"type": "hub", "name": "me/tiny-gpt2"},
                train={"max_steps": 20},
            )
        }
    )
    result = run(hub, project)
    assert result.code == 0, result.text
    saved = project.checkpoint()
    assert (
        json.loads(saved["tokenizer"]["json"])["model"]["vocab"]
        == json.loads(made.to_str())["model"]["vocab"]
    )
    assert saved["tokenizer"]["eos_id"] == made.token_to_id("<|endoftext|>")
    del hub.repos["models", "me/tiny-gpt2"]  # the checkpoint has it
    assert run(hub, project).code == 0


@pytest.mark.slow
def test_local_datasets_need_no_hub(make_project: Callable[..., Project]) -> None:
    """A folder of Parquet files and single files, through the same `hf` source, on a machine
    without network."""
    names = ["./data/folder", "./data/one.parquet", "./data/two.jsonl", "./data/three.csv"]
    sources = [{"type": "hf", "dataset": name, "name": Path(name).stem} for name in names]
    project = make_project({"t": streamed(*sources, train={"max_steps": 40})})
    folder = project.folder / "data" / "folder"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"train-{k}.parquet").write_bytes(parquet(texts(100 * k, 50), row_group_size=9))
    (folder.parent / "one.parquet").write_bytes(parquet(texts(1000, 50)))
    (folder.parent / "two.jsonl").write_bytes(lines(texts(2000, 50)))
    (folder.parent / "three.csv").write_text(
        "id,text\n" + "".join(f'{i},"{story(3000 + i, 2)}"\n' for i in range(50))
    )
    result = project.run("t", HF_HOME=str(project.folder / "hf_home"))
    assert result.code == 0 and "Traceback" not in result.text and warnings(project) == [], (
        result.text
    )
    read = project.events("step")[-1]["sources"]
    assert (
        set(read) == {"folder", "one", "two", "three"}
        and min(source["tokens"] for source in read.values()) > 0
    )


@pytest.mark.slow
def test_what_was_read_once_is_not_fetched_again(
    make_project: Callable[..., Project], hub: Hub
) -> None:
    """The token cache: the same data in another run asks the hub for next to nothing; without it,
    only time is lost."""
    preset = streamed("me/stories", train={"max_steps": 240})
    first = make_project({"t": preset}, "first")
    assert run(hub, first).code == 0
    asked = hub.asked_for_data()
    assert asked > 12 and list((first.folder / ".cache" / "tokens").glob("*/*.safetensors"))
    receipt = first.checkpoint()["data"]["receipt"]

    shutil.rmtree(first.folder / "checkpoints")
    hub.requests.clear()
    assert run(hub, first).code == 0
    assert hub.asked_for_data() < asked / 4, hub.requests
    assert first.checkpoint()["data"]["receipt"] == receipt

    halved = make_project(
        {"t": merged(preset, {"train": {"checkpoint_every_steps": 10}})}, "halved"
    )
    process = halved.start("t", **env(hub, halved))
    try:
        while (
            not (halved.folder / "checkpoints" / "t_current.pth").exists()
            or halved.num_steps() < 80
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        kill_group(process)
    assert halved.checkpoint()["progress"]["step"] < 240
    shutil.rmtree(halved.folder / ".cache")
    assert run(hub, halved).code == 0
    assert (
        halved.steps() == list(range(1, 241)) and halved.checkpoint()["data"]["receipt"] == receipt
    )
