"""slotlab doctor: facts about this machine for a bug report or a first look."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from slotlab.commands.options import Json, print_json

PACKAGES = (
    "slotlab", "torch", "torchvision", "timm", "open_clip_torch", "zarr", "h5py", "numpy", "dask",
    "tensorflow-datasets", "typer", "rich",
)  # fmt: skip

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
    findings["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "none"
    findings["disk_free_gb"] = round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)
    findings["weights_cache"] = str(cache_dir())
    try:
        sample = open_source(None)
        findings["embedded_sample"] = {name: len(sample.lengths(name)) for name in sample.splits()}
    except FeatcacheError as error:
        findings["embedded_sample"] = str(error)
    return findings


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
