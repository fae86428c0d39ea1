"""Measuring on a machine that is never quiet: jobs take turns, and what is reported is a median of pairs."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine() -> str:
    """One line that names what a figure was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, {torch.get_num_threads()} torch threads, torch {torch.__version__}"


def alternate(jobs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each job in turn, ``rounds`` times over: A B A B. Each returns its own rate."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            rates[name].append(job())
    return rates


def timed(work: Callable[[], int], device: torch.device | None = None) -> float:
    """Rate of ``work``, which returns how many items (or bytes) it did, once the device has finished them."""
    start = time.perf_counter()
    count = work()
    if device is not None:
        synchronize(device)
    return count / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def paired_ratio(rates: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of one job's rate over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(rates[of], rates[to], strict=True))
