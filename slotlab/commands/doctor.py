"""slotlab doctor: facts about this machine for a bug report or a first look."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

from slotlab.commands.options import Json, print_json

PACKAGES = (
    "slotlab", "torch", "torchvision", "timm", "open_clip_torch", "zarr", "h5py", "numpy", "dask",
    "tensorflow-datasets", "typer", "rich",
)  # fmt: skip

PROBED = 1 << 28  # bytes of page-locked memory; a stream to a GPU takes 96 MB at most

WITHOUT_LLVMLITE = (
    "absent; with it batches of 16 MB and more are read 1.2 (float16) to 1.6 times (int8) as fast on a CPU: "
    "pip install 'slotlab[fast]'"
)


def doctor(as_json: Json = False) -> None:
    """Show what this machine offers: packages, devices, disk, the cache of weights, the embedded sample."""
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        terminal.out.print(plain_table(("", "found"), [(k, str(v)) for k, v in findings.items()]))


def examine() -> dict[str, Any]:
    """Findings by name, JSON-able; missing parts are reported, not raised."""
    from importlib.metadata import PackageNotFoundError, version  # imports 50 modules, which --help does not need

    import torch

    from featcache.backbones.weights import cache_dir
    from featcache.errors import FeatcacheError
    from featcache.machine import free_memory, on_windows_drive, readable, under_wsl
    from featcache.sources import open_source

    findings: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            findings[name] = version(name)
        except PackageNotFoundError:
            findings[name] = "missing; pip install slotlab again"
    findings["tensorflow"] = "present" if importlib.util.find_spec("tensorflow") else "absent (only tfds: needs it)"
    findings["llvmlite"] = version("llvmlite") if importlib.util.find_spec("llvmlite") else WITHOUT_LLVMLITE
    findings["cpus"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings["torch_threads"] = torch.get_num_threads()
    findings["bfloat16"] = bfloat16_verdict(bfloat16_speed())
    findings |= examine_gpus()
    findings["compiler"] = compiler()
    if under_wsl():
        findings["wsl"] = f"{readable(free_memory())} of memory free; .wslconfig grants more (memory=, in GB)"
    if on_windows_drive(Path.cwd()):
        findings["folder"] = f"{Path.cwd()}: a drive of Windows, several times slower; work below {Path.home()}"
    findings["disk_free_gb"] = round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)
    findings["weights_cache"] = str(cache_dir())
    try:
        sample = open_source(None)
        findings["embedded_sample"] = {name: len(sample.lengths(name)) for name in sample.splits()}
    except FeatcacheError as error:
        findings["embedded_sample"] = str(error)
    return findings


def examine_gpus() -> dict[str, Any]:
    """What torch finds of NVIDIA's GPUs: names, memory, whether it has code for them, page-locked memory."""
    import torch

    from featcache.machine import free_device_memory, readable, unused_gpu
    from featcache.stream.staging import page_locked

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    findings: dict[str, Any] = {"torch_cuda": torch.version.cuda or "none", "nvidia_driver": nvidia_driver()}
    findings["gpus"] = names or unused_gpu() or "none"
    if not names:
        return findings
    built = torch.cuda.get_arch_list()
    capable, memory = [], []
    for index in range(len(names)):
        major, minor = torch.cuda.get_device_capability(index)
        # A card runs code of its own generation (major), and compiles what was left for later ones.
        known = any(arch.startswith((f"sm_{major}", "compute_")) for arch in built)
        capable.append(f"{major}.{minor}" + ("" if known else f": this torch has code for {' '.join(built)} alone"))
        total = torch.cuda.get_device_properties(index).total_memory
        free = free_device_memory(torch.device("cuda", index)) or 0
        memory.append(f"{readable(free)} of {readable(total)} free")
    lockable = page_locked(PROBED) is not None
    return findings | {
        "gpu_capability": capable,
        "gpu_memory": memory,
        "page_locked": f"{readable(PROBED)} {'' if lockable else 'not '}to be had",
    }


def nvidia_driver() -> str:
    """Its version, by the program that comes with it."""
    from featcache.machine import NVIDIA_SMI

    program = next(filter(None, map(shutil.which, NVIDIA_SMI)), None)
    if program is None:
        return "none"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not answer ({error})"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "sees no GPU"


def compiler() -> str:
    """Whether ``optim.compile`` has what it needs: a C compiler, and Python's headers."""
    lacks = [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacks.append("Python.h")
    if not lacks:
        return "present"
    return f"{' and '.join(lacks)} missing, for optim.compile: sudo apt install build-essential python3-dev"


def bfloat16_speed() -> float:
    """Speed of bfloat16 matrix products on the CPU, as a multiple of float32's: below 1 if they are emulated."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(384, 384, dtype=dtype)
        square @ square
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            square @ square
            taken.append(time.perf_counter() - start)
        seconds[dtype] = min(taken)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def bfloat16_verdict(speed: float) -> str:
    """The result of :func:`bfloat16_speed` in words."""
    return f"{speed:.2g} of float32's speed on the CPU" + ("" if speed > 1 else ": train in float32 there")
