"""Extraction by dask with many workers that are killed: what is lost, how long it takes, how evenly, how many bytes.

    python -m benchmarks.cluster [--videos 10000] [--workers 64] [--killed 0.05] [--seconds 0.25] [--together 8]

dask's own scheduler, nannies and worker processes, the product's own client, tasks, chunk files and manifest. What is
not real is the backbone, which sleeps ``--seconds`` a frame and returns few small tokens, and the machine, which all
workers share: one file system, and a network that is its loopback. A task is ``--together`` videos of two frames. A
share ``--killed`` of the tasks each kill their worker process once, with SIGKILL, after the first file of a video.
The store is compared with that of the plain, local extraction: manifest, chunks, tables, statistics, byte for byte.
dask's own profiler and monitors are off, as 64 of them would use up a small machine.

"Ideal" is the sleep of all tasks over the workers; "head" is the process with client, scheduler and nannies. Its bytes
are those of dask's messages, both ways. Then come, alone, what the manifest takes of rows of 24 frames and ten objects,
synced, and what the client merges of moments of a ViT-S's tokens, which every task sends.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

os.environ.update(
    PYTHONWARNINGS="ignore::RuntimeWarning:runpy",  # workers find this module imported already
    DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD="forkserver",  # they share their imports
    DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED="False",
    DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL="5s",
    DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL="10s",
)

import numpy as np
import torch
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.comm import tcp
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import get_mp_context

from benchmarks.harness import report
from featcache.backbones.backbone import Backbone
from featcache.extraction import distributed
from featcache.extraction.distributed import extract_distributed
from featcache.extraction.extract import extract
from featcache.extraction.job import merge
from featcache.extraction.plan import ExtractOptions, ExtractPlan, plan
from featcache.moments import Moments
from featcache.sources.video import Instance, Source, Video
from featcache.store import layout, manifest
from featcache.store.durable import LOCK
from featcache.store.reading import FeatureStore

FRAMES, SIDE, GRID, DIM = 2, 16, 2, 8  # of the videos and the stand-in's tokens
NOISY = ("distributed.nanny", "distributed.scheduler", "distributed.core", "distributed.batched", "distributed.worker")


class StandIn:
    """In place of a ViT: takes its time, and returns each patch's mean colour."""

    taps, grid, input_size = ("block1",), (GRID, GRID), (SIDE, SIDE)
    device = torch.device("cpu")
    spec = SimpleNamespace(name="stand-in", mean=(0.5, 0.5, 0.5))

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # a frame
        self.dims, self.provenance, self.preprocessing = {"block1": DIM}, {"library": "none"}, {"size": SIDE}

    def preprocess(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def __call__(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds * len(frames))
        cells = frames.float().reshape(-1, GRID, SIDE // GRID, GRID, SIDE // GRID, 3).mean((2, 4)).flatten(1, 2)
        return {"block1": torch.cat([cells, cells.square(), cells[..., :2]], -1) / 256}


class Deadly(Source):
    """Videos of noise; before some of them can be finished, their worker kills itself, once."""

    location = "noise"

    def __init__(self, videos: int, deadly: Sequence[int], folder: Path) -> None:
        self._videos, self._deadly, self._folder = videos, frozenset(deadly), folder

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def lengths(self, split: str) -> tuple[int, ...]:
        return (FRAMES,) * self._videos

    def fingerprints(self, split: str) -> tuple[str, ...]:
        return tuple(f"{index:016x}" for index in range(self._videos))

    def read(self, split: str, index: int) -> Video:
        if index in self._deadly and not (died := self._folder / str(index)).exists():
            died.touch()
            _die_at_the_next_file()
        frames = np.random.default_rng(index).integers(0, 256, (FRAMES, SIDE, SIDE, 3), np.uint8)
        return Video(f"{index:05d}", frames)


def _die_at_the_next_file() -> None:
    rename = os.replace

    def last(source: str, target: str) -> None:
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last  # type: ignore[assignment]


class Equip(WorkerPlugin):  # type: ignore[misc]
    """Gives a worker the stand-in."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def setup(self, worker: Any) -> None:
        distributed._backbone = lambda *_: StandIn(self._seconds)  # type: ignore[assignment]
        hush()
        torch.set_num_threads(1)
        os.fsync = lambda fd: None  # 64 machines' disks are not here


def hush() -> None:
    """No lines about workers that die, as they are to."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Ran(SchedulerPlugin):  # type: ignore[misc]
    """Counts the tasks that ended in each worker's place; a nanny gives the next process the same name."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self.tasks, self.removed = scheduler, Counter[str](), 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **more: Any) -> None:
        if (start, finish) == ("processing", "memory"):
            worker = self._scheduler.workers.get(more.get("worker"))
            self.tasks[str(worker.name if worker else more.get("worker"))] += 1

    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        self.removed += 1


class Traffic:
    """Bytes of dask's messages that this process has sent and received."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        write, unpack = tcp.TCP.write, tcp.from_frames

        async def counted(comm: Any, *args: Any, **more: Any) -> int:
            size: int = await write(comm, *args, **more)
            self.sent += size
            return size

        async def unpacked(frames: Any, *args: Any, **more: Any) -> Any:
            self.received += sum(memoryview(frame).nbytes for frame in frames)
            return await unpack(frames, *args, **more)

        tcp.TCP.write, tcp.from_frames = counted, unpacked


def planned(path: Path, source: Source, together: int) -> ExtractPlan:
    backbone: Any = StandIn(0)
    return plan(path, source, backbone, ExtractOptions(batch_size=together * FRAMES, precision="float32"))


def simulate(folder: Path, videos: int, workers: int, killed: float, seconds: float, together: int) -> dict[str, Any]:
    """One extraction; its figures, and the store in ``folder``."""
    tasks = [range(first, min(first + together, videos)) for first in range(0, videos, together)]
    chosen = np.random.default_rng(0).choice(len(tasks), round(killed * len(tasks)), replace=False)
    (died := folder / "died").mkdir(parents=True)
    source = Deadly(videos, [tasks[task][-1] for task in chosen], died)
    todo = planned(folder / "s.zarr", source, together)
    traffic = Traffic()
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None
    )
    with cluster, Client(cluster) as client:
        client.register_plugin(Equip(seconds))
        client.wait_for_workers(workers)
        ran = Ran(cluster.scheduler)
        cluster.scheduler.add_plugin(ran)
        before, cpu, began = (traffic.sent, traffic.received), time.process_time(), time.perf_counter()
        extract_distributed(todo, source, client)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        sent, received = traffic.sent - before[0], traffic.received - before[1]
        gone = ran.removed
    counts = sorted(ran.tasks.get(str(name), 0) for name in range(workers))
    lines = (folder / "s.zarr/train" / manifest.NAME).read_text().splitlines()
    ideal = videos * FRAMES * seconds / workers
    return {
        "killed": killed,
        "tasks": len(tasks),
        "workers_killed": len(list(died.iterdir())),
        "workers_seen_gone": gone,
        "videos_in_manifest": len(set(manifest.read(folder / "s.zarr/train"))),
        "rows_in_manifest": len(lines),
        "seconds": round(took, 1),
        "ideal_seconds": round(ideal, 1),
        "head_cpu_seconds": round(cpu, 1),
        "tasks_run": sum(ran.tasks.values()),
        "tasks_of_a_worker": [counts[0], statistics.median(counts), counts[-1]],
        "head_received_bytes_a_task": round(received / len(tasks)),
        "head_sent_bytes_a_task": round(sent / len(tasks)),
        "complete": FeatureStore.open(folder / "s.zarr")["train"].complete,
    }


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store, the manifest's rows in order of the videos."""
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != LOCK}
    rows = f"train/{manifest.NAME}"
    return found | {rows: b"\n".join(sorted(found[rows].split(b"\n")))}


def manifest_rows(folder: Path, seconds: float = 3.0) -> dict[str, float]:
    """Rows that the manifest takes in a second: each synced, and 64 at a time, as they come from 64 workers."""
    shape = tuple(range(24))
    instances = tuple(Instance("cube", "small", "red", "metal", shape) for _ in range(10))
    sums = {name: (2**32 - 1,) for name in ("video", "segmentations", "ignored", "features/block12")}
    rates = {}
    for together in (1, 64):
        (place := folder / f"rows{together}").mkdir()
        with manifest.Appender(place) as appender:
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                appender.append(
                    *(manifest.Row(count + i, f"{count + i:05d}", 24, sums, instances) for i in range(together))
                )
                count += together
            rates[f"{together}_at_a_time"] = round(count / (time.perf_counter() - began))
    return rates


def merged(rounds: int = 20) -> dict[str, float]:
    """Bytes of a task's moments for a ViT-S at 224 px, and how many the client unpacks and merges in a second."""
    moments = Moments.from_tokens(torch.randn(4, 256, 384))
    data, total = pickle.dumps({"block12": moments}), dict[str, Moments]()
    began = time.process_time()  # not of the clock: it computes, and waits for nothing
    for _ in range(rounds):
        merge(total, pickle.loads(data))
    return {"bytes": len(data), "tasks_a_second": round(rounds / (time.process_time() - began))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--killed", type=float, default=0.05, help="share of the tasks")
    parser.add_argument("--seconds", type=float, default=0.25, help="of the stand-in, a frame")
    parser.add_argument("--together", type=int, default=8, help="videos of a task")
    parser.add_argument("--folder", type=Path, help="folder of the stores; default: the temporary folder")
    args = parser.parse_args()

    hush()
    get_mp_context().set_forkserver_preload(["benchmarks.cluster"])
    layout.SHARDED = sys.maxsize  # a file for each chunk, as full-size tokens have it
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = {"manifest_rows_a_second": manifest_rows(Path(folder)), "moments": merged()}
        run = simulate(Path(folder) / "a", args.videos, args.workers, args.killed, args.seconds, args.together)
        print(run, file=sys.stderr, flush=True)
        source, backbone = Deadly(args.videos, (), Path(folder)), cast(Backbone, StandIn(0))
        with patch.object(os, "fsync", lambda fd: None):
            extract(planned(Path(folder) / "local.zarr", source, args.together), source, backbone)
        run["bytes_of_the_local_store"] = contents(Path(folder) / "a/s.zarr") == contents(Path(folder) / "local.zarr")
    report("cluster", {"videos": args.videos, "workers": args.workers, **run, **figures})


if __name__ == "__main__":
    from benchmarks.cluster import main as run_main  # so that workers find the classes under their own name

    run_main()
