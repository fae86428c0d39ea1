"""Extractions in a process of their own that dies at a chosen point in the order of writes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")  # which has done the imports (tests/conftest.py)

# Every call that changes what is on the disk, or promises that it will stay.
WRITES = ("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate", "link", "rmdir")


def extraction(path: str, batch_size: int | None = 3, max_videos: int | None = None) -> None:
    """Extract the synthetic videos with a small random backbone."""
    import torch

    from featcache.backbones.backbone import load_backbone
    from featcache.extraction.extract import extract
    from featcache.extraction.plan import ExtractOptions, plan
    from tests.synthetic import DiscSource

    torch.set_num_threads(1)
    source, backbone = DiscSource(), load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)
    options = ExtractOptions(batch_size=batch_size, precision="float32", max_videos=max_videos)
    extract(plan(Path(path), source, backbone, options), source, backbone)


def follow(path: str, source: str) -> None:
    """Bring a store of a folder of videos to what the folder holds now."""
    import torch

    from featcache.backbones.backbone import load_backbone
    from tests.growing import GROW, run

    torch.set_num_threads(1)
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)
    run(Path(path), Path(source), backbone, replace(GROW, prune=True))


def repair(path: str) -> None:
    """Repair a store that `extraction` made."""
    import torch

    from featcache.backbones.backbone import load_backbone
    from featcache.upkeep.repair import Means
    from featcache.upkeep.repair import repair as run_repair
    from tests.synthetic import DiscSource

    torch.set_num_threads(1)
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)
    run_repair(Path(path), Means(data=DiscSource(), backbone=backbone))


def export(path: str, out: str, shard_videos: int) -> None:
    """Copy a store."""
    from featcache.upkeep.convert import ConvertOptions, convert

    convert(Path(path), Path(out), ConvertOptions(shard_videos=shard_videos))


def hold_lock(path: str) -> None:
    """Die with the lock of a store held."""
    from featcache.store.reading import FeatureStore
    from featcache.store.writing import StoreWriter

    with StoreWriter(Path(path), FeatureStore.open(path).spec):
        os.kill(os.getpid(), signal.SIGKILL)


def _counted(job: Callable[..., None], args: tuple[Any, ...], die_at: int | None, done: Any) -> None:
    """Run ``job`` counting writes; the ``die_at``-th is preceded by SIGKILL."""
    count = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counting(*a: Any, **k: Any) -> Any:
            nonlocal count
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*a, **k)

        setattr(os, name, counting)

    for name in WRITES:
        wrap(name)
    job(*args)
    done.value = count


def run(job: Callable[..., None], *args: Any, die_at: int | None = None) -> tuple[int, int]:
    """Exit code (negative: the signal) and number of writes of ``job`` in its own process."""
    done = _context.Value("q", -1)
    process = _context.Process(target=_counted, args=(job, args, die_at, done))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the extraction hangs"
    return process.exitcode, int(done.value)
