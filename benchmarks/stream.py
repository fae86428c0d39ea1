"""Reading batches of cached features: featcache beside the libraries that read such stores, in one run.

    python -m benchmarks.stream [--videos 150] [--rounds 7]

Every reader fills batches from the same values: featcache, zarr-python and tensorstore from the same files,
h5py from a contiguous copy, a DataLoader from the zarr store with two workers. Each is given its fastest way
that was found (`peers`). Figures are medians over rounds in which all take turns; ratios are medians of the
rounds' own ratios. Bytes are those of the batch as float16, so that int8 compares in samples a second.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import alternate, paired_ratio, report, timed
from benchmarks.stores import TAP, random_store
from featcache.bench.stream import ACCESSES, Access, Starts, Window, bare_read, measure_cold, memory_limit, whole_stream
from featcache.store.encoding import FEATURES
from featcache.store.reading import Split

BATCHES = 4  # in one turn
AHEAD = 4  # batches that a DataLoader with two workers keeps ready
Reader = Callable[[Starts, npt.NDArray[np.float16]], None]  # fills (B, T, N, D)


def zarr_reader(split: Split, access: Access) -> Reader:
    array = split.array(f"features/{TAP}")

    def slices(starts: Starts, out: npt.NDArray[np.float16]) -> None:
        for sample, start in enumerate(starts.tolist()):
            out[sample] = array[start : start + access.frames]

    def together(starts: Starts, out: npt.NDArray[np.float16]) -> None:
        out[:, 0] = array.oindex[starts]

    return together if access.frames == 1 else slices


def tensorstore_reader(split: Split, access: Access) -> Reader:
    import tensorstore as ts

    array: Any = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(split.path / f"features/{TAP}")}},
        context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}),
    ).result()

    def slices(starts: Starts, out: npt.NDArray[np.float16]) -> None:
        reads = [array[start : start + access.frames].read() for start in starts.tolist()]  # all at once
        for sample, read in enumerate(reads):
            out[sample] = read.result()

    def together(starts: Starts, out: npt.NDArray[np.float16]) -> None:
        out[:, 0] = array.oindex[starts].read().result()

    return together if access.frames == 1 else slices


def hdf5_reader(dataset: Any, access: Access) -> Reader:
    def read(starts: Starts, out: npt.NDArray[np.float16]) -> None:
        for sample, start in enumerate(starts.tolist()):
            dataset.read_direct(out, np.s_[start : start + access.frames], np.s_[sample])

    return read


class Clips(Dataset[torch.Tensor]):
    """One sample an item, as a PyTorch project would first write it."""

    def __init__(self, path: Path, starts: Starts, frames: int) -> None:
        self._path, self._starts, self._frames = path, starts, frames
        self._array: Any = None  # opened in each worker

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._array is None:
            self._array = zarr.open_array(str(self._path), mode="r")
        start = int(self._starts[index])
        return torch.from_numpy(self._array[start : start + self._frames])


def dataloader(window: Window, access: Access) -> tuple[Callable[[], float], Iterator[torch.Tensor]]:
    starts = window.starts(access.frames)
    clips = Clips(window.split.path / f"features/{TAP}", starts, access.frames)
    sampler = torch.utils.data.RandomSampler(starts, replacement=True, num_samples=1 << 20)  # type: ignore[arg-type]
    batches = iter(DataLoader(clips, access.samples, sampler=sampler, num_workers=2, multiprocessing_context="spawn"))
    next(batches)  # the workers have started

    def work() -> int:
        return sum(batch.nbytes for batch in islice(batches, 2))

    def job() -> float:
        for _ in islice(batches, AHEAD):  # what was read while other jobs ran
            pass
        achieved = timed(work)
        time.sleep(2 * AHEAD * access.samples * access.frames * window.frame_bytes / achieved)
        return achieved  # and the workers, having read ahead again, leave the next job alone

    return job, batches


def peer(window: Window, access: Access, reader: Reader) -> Callable[[], float]:
    """A job that fills reused buffers with random samples."""
    ring = [window.buffers(access)[FEATURES].numpy() for _ in range(3)]

    def read(draws: list[Starts]) -> int:
        for batch, starts in enumerate(draws):
            reader(starts, ring[batch % 3])
        return len(draws) * ring[0].nbytes

    expected, (starts,) = window.buffers(access), window.draws(access, 1)
    window.read(starts, expected)
    reader(starts, ring[0])
    assert np.array_equal(ring[0], expected[FEATURES].numpy()), "the peers must read the same values"

    def job() -> float:
        draws = window.draws(access, BATCHES)
        return timed(lambda: read(draws))

    return job


def measure(access: Access, float16: Window, shared: Window, int8: Window, dataset: Any, rounds: int) -> dict[str, Any]:
    cpu = torch.device("cpu")
    loaded, batches = dataloader(float16, access)
    jobs = {
        "limit": memory_limit(float16, access, BATCHES),
        "featcache_read": bare_read(float16, access, BATCHES),
        "featcache_stream": whole_stream(float16, access, BATCHES, cpu, "disk"),
        "featcache_2_threads_read": bare_read(shared, access, BATCHES),
        "featcache_2_threads_stream": whole_stream(float16, access, BATCHES, cpu, "disk", 2),
        "featcache_int8_read": bare_read(int8, access, BATCHES),
        "featcache_int8_stream": whole_stream(int8, access, BATCHES, cpu, "disk"),
        "zarr": peer(float16, access, zarr_reader(float16.split, access)),
        "tensorstore": peer(float16, access, tensorstore_reader(float16.split, access)),
        "h5py": peer(float16, access, hdf5_reader(dataset, access)),
        "dataloader_zarr": loaded,
    }
    rates = alternate(jobs, rounds)
    del batches  # ends the workers
    medians = {name: round(statistics.median(values) / 1e9, 3) for name, values in rates.items()}
    others = ("tensorstore", "h5py", "dataloader_zarr")
    best = max(others, key=lambda name: medians[name])
    return {
        "gb_per_s": medians,
        "ratio_to_limit": {name: round(paired_ratio(rates, name, "limit"), 3) for name in jobs if name != "limit"},
        "stream_to_zarr": round(paired_ratio(rates, "featcache_stream", "zarr"), 1),
        "stream_to_best_other": {best: round(paired_ratio(rates, "featcache_stream", best), 2)},
        "2_threads_to_best_other": {best: round(paired_ratio(rates, "featcache_2_threads_stream", best), 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="folder of the stores; default: the temporary folder")
    args = parser.parse_args()

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        splits = {name: random_store(folder / name, args.videos, name)["train"] for name in ("float16", "int8")}
        float16, int8 = (Window(split, TAP) for split in splits.values())
        with h5py.File(folder / "features.h5", "w") as file:
            file["features"] = splits["float16"].array(f"features/{TAP}")[...]
        with h5py.File(folder / "features.h5") as file:
            shared = Window(splits["float16"], TAP, threads=2)
            figures = {a.name: measure(a, float16, shared, int8, file["features"], args.rounds) for a in ACCESSES}
        del float16, shared, int8  # what is mapped cannot be dropped from the page cache
        cold = {r.name: r.as_dict() for r in measure_cold(splits["float16"], TAP, args.rounds)}
    finally:
        shutil.rmtree(folder)
    report("stream", {"videos": args.videos, "rounds": args.rounds, "patterns": figures, "cold": cold})


if __name__ == "__main__":
    main()
