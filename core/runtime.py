"""The machine: device, precision, ranks, and the settings of torch that cost speed when left alone.

In:    the environment (torchrun's variables)
Out:   Runtime
State: none of its own; `prepare` changes torch's global switches once, at the start of main()
"""

import ctypes
import gc
import os
import platform
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import UserError

WITHOUT_BF16 = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)
"""What ONEDNN_MAX_CPU_ISA may hold the library of matrix products to that multiplies no bf16 in
hardware."""


@dataclass(frozen=True)
class Runtime:
    """The machine and the ranks that this process runs on."""

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1  # ranks on this machine

    @property
    def bf16_is_native(self) -> bool:
        """Return whether the device multiplies bf16 matrices in hardware (not emulated, which is
        slower than fp32)."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_capability(self.device)[0] >= 8
        if (
            os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
        ).upper() in WITHOUT_BF16:
            return False  # the processor may, but its products are told not to
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({torch.get_num_threads()} threads)"

    def compute_dtype(self, precision: str) -> torch.dtype:
        """The dtype of matrix products for a preset's `precision`; weights and sums stay fp32."""
        bf16 = precision == "bf16" or (precision == "auto" and self.bf16_is_native)
        return torch.bfloat16 if bf16 else torch.float32

    def memory_bytes(self) -> int:
        """Return the memory of the device: a GPU its own; a CPU the machine's, or what this
        container may use of it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                with open(limit) as file:
                    there = min(there, int(file.read()))
            except (OSError, ValueError):  # no container, or "max"
                pass
        return there

    @property
    def ranks_of_a_memory(self) -> int:
        """Return the number of ranks that share `memory_bytes`: one a GPU, on CPUs all ranks of
        the machine."""
        return 1 if self.device.type == "cuda" else self.local_world_size

    def keep_order(self, deterministic: bool) -> str:
        """On a GPU, take only kernels that add in the same order each time, or whichever is
        fastest; a CPU's always do.

        Returns what a second run would give, for the run card.
        """
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(deterministic)
            # a debugging aid that writes everything twice
            # torch publishes no types for this module
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.backends.cudnn.deterministic = deterministic
            if not deterministic:
                return (
                    "nearly the same numbers: a GPU adds in any order, unless "
                    "train.deterministic is true"
                )
        return (
            "the same bits, on the same machine and versions, at the same precision and "
            "number of processes and threads"
        )

    def memory_mb(self) -> float:
        """Peak memory of this process since it began, or since `forget_peak_memory`: on the device,
        or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            with open("/proc/self/status") as status:
                return (
                    next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
                    / 2**10
                )
        except (OSError, StopIteration):  # not Linux
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                2**20 if platform.system() == "Darwin" else 2**10
            )


def detect_runtime() -> Runtime:
    """Read torchrun's variables and look for a GPU. Raises UserError where they are half set, or do
    not fit each other."""
    world_size = _launcher_number("WORLD_SIZE", 1, 1, 2**20)
    several = world_size > 1
    rank = _launcher_number("RANK", None if several else 0, 0, world_size - 1)
    local_rank = _launcher_number("LOCAL_RANK", None if several else 0, 0, world_size - 1)
    if several:
        _launcher_number("MASTER_PORT", None, 1, 65535)
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise _half_set("MASTER_ADDR, where the processes meet, is not set")
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise _half_set(
            f"LOCAL_RANK is {local_rank}, and this machine has {torch.cuda.device_count()} GPUs, "
            "counted from 0"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    on_this = _launcher_number("LOCAL_WORLD_SIZE", world_size, 1, world_size) if several else 1
    return Runtime(device, rank, local_rank, world_size, on_this)


def _launcher_number(name: str, default: int | None, low: int, high: int) -> int:
    """A variable of the launcher; `default` where it is not set, None: it has to be."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise _half_set(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but {name} is not set")
    if re.fullmatch(r"\s*\d{1,9}\s*", value) is None or not low <= int(value) <= high:
        raise _half_set(f"{name} is {value!r}; it has to be a whole number from {low} to {high}")
    return int(value)


def _half_set(what: str) -> UserError:
    return UserError(
        f"the launcher's variables do not fit: {what}. `torchrun --nproc_per_node=N main.py` sets "
        "them all; to train in one "
        "process, unset WORLD_SIZE, RANK and LOCAL_RANK."
    )


def prepare(runtime: Runtime) -> None:
    """Switch on what is safe and fast: TF32 on GPUs; on CPUs, memory that is reused instead of
    returned."""
    if runtime.device.type == "cuda":
        # read when CUDA starts; `keep_order` needs it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(runtime.device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        keep_freed_memory()
        if runtime.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // runtime.world_size))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next allocation.

    By default every tensor above 32 MB is mapped afresh from the kernel and its pages are zeroed
    one fault at a time, each micro-batch again. docs/LOG.md has what this is worth.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold, top_pad = -4, -1, -2
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
    except (OSError, AttributeError):  # not glibc: its own allocator decides
        pass


def uncompiled(device: torch.device) -> AbstractContextManager:
    """A context in which compiled models and functions run as they are written: for shapes that
    compiling would not pay for.

    Nothing to do where nothing is compiled, which is known without importing the compiler: on a CPU
    only models are, by then."""
    if device.type == "cuda" or "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def forget_peak_memory(runtime: Runtime) -> bool:
    """Free what an earlier run of this process no longer needs, and let `memory_mb` count from
    here.

    False where the system cannot forget a peak (anything but Linux): a run that needs less than one
    before it shows that one's."""
    # compiled code of models that are gone; it is also limited in number
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
        return True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # `keep_freed_memory` holds on to it
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return False
    return True


def versions() -> dict[str, Any]:
    """List what a result depends on, for the run card."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    for package in ("tokenizers", "transformers", "datasets", "pymupdf", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
