"""Shared by the benchmarks: alternating runs, medians, and the machine's name beside every figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from featcache.machine import alternate, machine, paired_ratio, timed

__all__ = ["alternate", "paired_ratio", "report", "timed"]


def report(title: str, figures: Mapping[str, Any]) -> None:
    print(json.dumps({"benchmark": title, "machine": machine(), **figures}, indent=1))
