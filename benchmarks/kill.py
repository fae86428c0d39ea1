"""Random ``kill -9`` of extractions: python -m benchmarks.kill --kills 100

Each extraction is killed at a random moment of its writing. After each kill, every chunk file with its final name must
be whole, every manifest row true, and ``verify`` silent; every finished store must equal an unbroken one byte for byte.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import report
from featcache.store import manifest
from featcache.upkeep.verify import verify
from tests.synthetic import DiscSource, arrays_of

VIDEOS = {"train": (4,) * 16 + (3,), "validation": (4, 2)}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.crash_imports"])


def _extraction(path: str, began: Any) -> None:
    import torch

    from featcache.backbones.backbone import load_backbone
    from featcache.extraction.extract import extract
    from featcache.extraction.plan import ExtractOptions, plan

    torch.set_num_threads(1)
    source, backbone = DiscSource(VIDEOS), load_backbone("resnet18", "random", ("layer1",), 32)
    todo = plan(Path(path), source, backbone, ExtractOptions(batch_size=6, precision="float32"))
    began.set()
    extract(todo, source, backbone)


def _run(path: Path, seconds: float | None) -> tuple[bool, float]:
    """Extract, and kill after ``seconds`` of it; whether it was killed, and how long it ran."""
    began = _context.Event()
    process = _context.Process(target=_extraction, args=(str(path), began))
    process.start()
    assert began.wait(120), "the extraction does not begin"
    start = time.perf_counter()
    process.join(seconds)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the extraction failed with {process.exitcode}"
    return process.exitcode != 0, time.perf_counter() - start


def _faults(path: Path, unbroken: Path) -> list[str]:
    """What a killed extraction left that it must not."""
    if not (path / "zarr.json").exists():
        return []
    faults = [f"verify: {damage.what}" for damage in verify(path)]
    for chunk in path.glob("*/**/c.*"):
        if chunk.suffix != ".tmp" and chunk.read_bytes() != (unbroken / chunk.relative_to(path)).read_bytes():
            faults.append(f"torn: {chunk.relative_to(path)}")
    for split in VIDEOS:
        promised = manifest.read(unbroken / split)
        faults += [f"false row: {split} {v}" for v, row in manifest.read(path / split).items() if row != promised[v]]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    deaths: Counter[str] = Counter()
    faults: list[str] = []
    stores = unequal = 0
    with tempfile.TemporaryDirectory() as folder:
        unbroken, path = Path(folder) / "unbroken.zarr", Path(folder) / "killed.zarr"
        _, seconds = _run(unbroken, None)
        expected = arrays_of(unbroken)
        while (kills := sum(deaths.values())) < arguments.kills or path.exists():
            # After the last kill the last store is finished.
            killed, _ = _run(path, rng.uniform(0, 0.4 * seconds) if kills < arguments.kills else None)
            done = sum(len(manifest.read(path / split)) for split in VIDEOS)
            if killed:
                total = sum(map(len, VIDEOS.values()))
                deaths["before the first video" if not done else "after the last" if done == total else "between"] += 1
                faults += _faults(path, unbroken)
            else:
                stores += 1
                unequal += arrays_of(path) != expected
                shutil.rmtree(path)
    report(
        "kill",
        {
            "kills": dict(deaths),
            "unbroken_seconds": round(seconds, 2),
            "faults": faults,
            "stores_finished": stores,
            "stores_unlike_the_unbroken": unequal,
        },
    )
    if faults or unequal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
