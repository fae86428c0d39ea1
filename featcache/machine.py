"""This machine: its devices and free memory, limits on threads, and fair measurements of time.

``torch.set_num_threads`` limits the calling thread, but also sets the default of threads that start later, so every
helper here restores that default."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from featcache.errors import UsageError

CPUINFO = Path("/proc/cpuinfo")
NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # comes with the driver
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # Linux's names of the instructions on x86 and arm64


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or with ``auto`` the fastest one. ``UsageError`` if the machine lacks it.

    Under torchrun each process of a machine gets its own GPU, and touches no other.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and (rank := os.environ.get("LOCAL_RANK")):
        name = f"cuda:{rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not on this machine ({str(error).splitlines()[0]}); use cpu") from error


def free_memory() -> int:
    """Bytes of host memory that are available, with reclaimable page cache on Linux; 0 if unknown."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0


def free_device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that torch can still have, those included that it holds without use; None for others.

    A process that was given a share of the memory (:func:`share_memory`) has no more than that.
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_allocated(device)
    idle = torch.cuda.memory_reserved(device) - held
    free, total = torch.cuda.mem_get_info(device)
    # A share is given by the process to itself, so one that has not used the GPU yet has none.
    share = torch.cuda.get_per_process_memory_fraction(device) if torch.cuda.is_initialized() else 1.0  # type: ignore[no-untyped-call]
    return int(min(free + idle, share * total - held))


def share_memory(device: torch.device, processes: int) -> None:
    """Let this process have its part of a GPU's memory, which as many use; on other devices nothing happens."""
    if device.type == "cuda" and processes > 1:
        torch.cuda.set_per_process_memory_fraction(1 / processes, device)


def readable(size: float) -> str:
    """A number of bytes for people: ``22.9 GB``, of 10^9 bytes each, or ``3.1 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


@functools.cache
def native_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products, and torch has the library that uses them.

    Linux lists the instructions; on other systems the answer is False.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text().splitlines()
        flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
        return not BFLOAT16.isdisjoint(flags)
    return False


@contextlib.contextmanager
def limited(cores: int = 1) -> Iterator[None]:
    """Limit torch operations of the calling thread to ``cores`` cores, as a context manager.

    One core is best for many small operations: a second thread gains less on each than the wait for it costs, and
    beside another program that wait is a whole turn of the scheduler.
    """
    threads = torch.get_num_threads()
    if threads == cores:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start_limited(work: Callable[[], None], name: str, cores: int = 1) -> threading.Thread:
    """A running daemon thread whose torch operations use ``cores`` cores."""
    threads = torch.get_num_threads()
    limited = threading.Event()

    def run() -> None:
        torch.set_num_threads(cores)
        limited.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    limited.wait()
    torch.set_num_threads(threads)
    return thread


def limited_executor(name: str, workers: int = 1) -> ThreadPoolExecutor:
    """An executor of ``workers`` threads whose torch operations use one core each."""
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, name, initializer=torch.set_num_threads, initargs=(1,))
    everyone = threading.Barrier(workers)  # each thread waits for the others, so that none takes two calls
    for call in [executor.submit(everyone.wait) for _ in range(workers)]:
        call.result()  # all threads exist now, and are limited
    torch.set_num_threads(threads)
    return executor


def machine(device: torch.device | None = None) -> str:
    """One line that describes a device of this machine, for measured figures; None: the one that ``auto`` picks."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, {torch.get_num_threads()} torch threads, torch {torch.__version__}"


def chosen(device: torch.device) -> str:
    """One line: the device that a command runs on, and why a GPU that seems to be there is left alone."""
    why = unused_gpu() if device.type == "cpu" else ""
    return f"device: {device}, {machine(device)}" + (f"; {why}" if why else "")


def unused_gpu() -> str:
    """Why torch does not use the NVIDIA GPU whose driver is installed, and what to do; empty if it does, or none is."""
    if torch.cuda.is_available() or not any(map(shutil.which, NVIDIA_SMI)):
        return ""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return "the NVIDIA GPU is hidden by CUDA_VISIBLE_DEVICES"
    if torch.version.cuda is None:
        return "an NVIDIA driver is installed, but this torch has no CUDA; install another: https://pytorch.org"
    return (
        f"an NVIDIA driver is installed, but it does not serve CUDA {torch.version.cuda}, which this torch needs; "
        "update the driver, or install a torch of an older CUDA: https://pytorch.org"
    )


def under_wsl() -> bool:
    """Whether this is Linux under Windows (WSL)."""
    return "microsoft" in platform.release().lower()


def on_windows_drive(path: Path) -> bool:
    """Whether a path leads to a drive of Windows from WSL, where files are read and written several times slower."""
    return under_wsl() and re.match(r"/mnt/[a-z](/|$)", str(path.resolve())) is not None


def alternate(jobs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The rates of jobs that run in turn for ``rounds`` rounds (A B A B); each job returns its rate."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            rates[name].append(job())
    return rates


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of float32 are float32 inside, on NVIDIA GPUs too: cuDNN would take TensorFloat-32, whose mantissa
    has ten bits, unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def timed(work: Callable[[], int], device: torch.device | None = None) -> float:
    """Rate of ``work`` in items (or bytes) a second, until the device has finished; ``work`` returns their number."""
    start = time.perf_counter()
    count = work()
    if device is not None:
        synchronize(device)
    return count / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def paired_ratio(rates: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of job ``of``'s rate divided by job ``to``'s rate in the same round."""
    return statistics.median(a / b for a, b in zip(rates[of], rates[to], strict=True))
