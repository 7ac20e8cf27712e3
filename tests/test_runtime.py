"""The machine as a run sees it: what products it has in hardware, and whether a second run would
give the same bits."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.parallel.single import Single
from core.preset.decode import decode_preset
from core.registry import Preset
from core.runtime import Runtime, detect_runtime, prepare
from core.training.machine import Machine
from core.training.passes import compile_plan
from core.training.progress import Budget
from tests.project import Project, differences, merged, tiny_preset, train_here

CPU, GPU = (Runtime(torch.device(kind), 0, 0, 1) for kind in ("cpu", "cuda"))


@pytest.mark.parametrize(
    "limit, native",
    [
        (None, True),
        ("", True),
        ("ALL", True),
        ("AVX512_CORE_BF16", True),
        ("avx512_core_amx", True),
        ("nonsense", True),
    ]
    + [
        (limit, False)
        for limit in ("SSE41", "AVX2", "avx2", "AVX2_VNNI_2", "AVX512_CORE", "avx512_core_vnni")
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bf16_is_native_where_products_may_use_it(
    name: str, limit: str | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that has bf16 emulates it, slower than fp32, where its library of products is
    held to older instructions."""
    for each in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(each, raising=False)
    if limit is not None:
        monkeypatch.setenv(name, limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert CPU.bf16_is_native == native
    assert CPU.compute_dtype("auto") == (torch.bfloat16 if native else torch.float32)
    assert CPU.compute_dtype("bf16") == torch.bfloat16  # who asks for it gets it
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not CPU.bf16_is_native


@pytest.fixture
def switches() -> Iterator[None]:
    """torch's, as they were."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill, cudnn = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
    )
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic = (
        fill,
        cudnn,
    )


def test_a_gpu_keeps_the_order_of_its_sums_where_that_is_asked_for(
    switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial of a comparison after the other: the switches are what each asks for."""
    for wanted in (True, False, True):
        told = GPU.keep_order(wanted)
        assert (
            torch.are_deterministic_algorithms_enabled()
            == torch.backends.cudnn.deterministic
            == wanted
        )
        # or SDPA's kernels keep adding in any order
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert (
            told.startswith("the same bits" if wanted else "nearly the same")
            and ("train.deterministic" in told) != wanted
        )
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for given, kept in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if given:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        prepare(GPU)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == kept


def test_a_cpu_gives_the_same_bits_either_way(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    for name, wanted in (("on", True), ("off", False)):
        events = train_here(
            merged(tiny_preset(), {"train": {"deterministic": wanted, "max_steps": 3}}),
            tmp_path / name,
        )
        assert events[0]["repeats"].startswith("the same bits")
        assert torch.are_deterministic_algorithms_enabled() == before
    on, off = (Project(tmp_path / name).checkpoint() for name in ("on", "off"))
    assert differences(on, off) == [] and detect_runtime().keep_order(
        False
    ) == detect_runtime().keep_order(True)


def test_whether_compiling_pays_is_a_question_of_one_device() -> None:
    """Ranks share the tokens of a run; of its steps each device makes all, with rows of its own."""
    # 4 rows of 32 tokens
    preset = decode_preset(tiny_preset(train={"max_steps": None}), Preset, "t", "t")
    budget, steps = Budget(2 * 10**10, 2 * 10**10), Budget(2 * 10**10, 2 * 10**10, 10**7, 10**7)

    def told(parameters: int, budget: Budget, world_size: int) -> str:
        machine = Machine(replace(GPU, world_size=world_size), Single(), torch.float32)
        return compile_plan(preset, machine, None, parameters, budget, False)[1]

    assert told(10**7, budget, 1).startswith("compiled") and "takes about 1500 s" in told(
        10**7, budget, 8
    )
    assert told(10**8, steps, 1).startswith("compiled") and told(10**8, steps, 8).startswith(
        "compiled"
    )
    assert "takes about 768 s" in told(10**7, steps, 1) and "takes about 768 s" in told(
        10**7, steps, 8
    )


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 1),  # left over from a launcher that is not there
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"WORLD_SIZE": "4"}, 4),
    ],
)
def test_ranks_of_one_machine_share_its_memory(
    variables: dict, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**meeting, **variables}.items():
        monkeypatch.setenv(name, value)
    runtime = replace(detect_runtime(), device=torch.device("cpu"))
    assert runtime.ranks_of_a_memory == ranks
    assert replace(runtime, device=torch.device("cuda")).ranks_of_a_memory == 1
