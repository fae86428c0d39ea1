"""Many single images of mixed sizes: how long it takes to see what is there, what extraction takes, and their store.

    python -m benchmarks.many_images [--images 20000] [--extracted 2000] [--stored 118000] [--folder DIR]

The images are copies of a hundred JPEG and PNG files of 48 to 640 pixels a side, made for the purpose. Their
extraction, by a ResNet-18 with random weights at 32 px and frames of 64 px, runs in a separate process, whose anonymous
memory is sampled: for as many images as are given, and for a tenth of them, so that growth shows.

The store of as many images as COCO has holds tokens of 16x16x384 that are holes in its files, so that it needs no room
on the disk, and a manifest with seven objects an image. It is opened as a trainer opens it, and streamed beside a copy
in memory (`featcache.bench.stream`). Seconds are medians of five, by the clock and of the processor.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import report
from benchmarks.large_store import in_own_process
from benchmarks.stores import TAP, sparse_store
from featcache.sources import open_source

POOL = 100


def make(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    pool = []
    for number in range(POOL):
        height, width = rng.integers(48, 641, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        data, kind = io.BytesIO(), ("JPEG", "PNG")[number % 2]
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(data, kind)
        pool.append((data.getvalue(), kind.lower()))
    for split, images in (("train", count), ("validation", max(1, count // 100))):
        (folder / split).mkdir(parents=True)
        for number in range(images):
            data, suffix = pool[number % POOL]
            (folder / split / f"photo{number}.{suffix}").write_bytes(data)


def seen(folder: Path) -> dict[str, float]:
    """Seconds of each step that comes before the first pixel is decoded."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - began, 2)
        return result

    source = timed("scan", lambda: open_source(folder))
    count = len(timed("lengths", lambda: source.lengths("train")))
    timed("sizes", lambda: [source.size("train", index) for index in range(count)])
    timed("remarks", lambda: source.remarks("train"))
    timed("fingerprint", lambda: source.fingerprint("train"))
    return seconds


def extracted(folder: Path, out: Path, images: int) -> int:
    """Images extracted to a store."""
    from featcache.backbones.backbone import load_backbone
    from featcache.extraction.extract import extract
    from featcache.extraction.plan import ExtractOptions, plan

    source = open_source(folder)
    backbone = load_backbone("resnet18", weights="random", taps=("layer2",), input_size=32)
    options = ExtractOptions(("train",), max_videos=images, frame_size=64)
    return extract(plan(out, source, backbone, options), source, backbone)["train"].frames


def stored(folder: Path, images: int) -> dict[str, object]:
    """Files, manifest and rates of a store of single images."""
    from featcache.bench.stream import measure_stream
    from featcache.store import manifest
    from featcache.store.reading import FeatureStore
    from featcache.stream.stream import FeatureStream

    path = folder / "images.zarr"
    split = sparse_store(path, images, frames=1)["train"]

    def first_batch() -> None:
        next(iter(FeatureStream(FeatureStore.open(path)["train"], TAP, batch_size=256)))

    steps: dict[str, Callable[[], object]] = {
        "open": lambda: FeatureStore.open(path)["train"],
        "every row of the manifest": lambda: list(split.manifest.values()),
        "open and first batch of 256": first_batch,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(5):
        for name, step in steps.items():
            began, busy = time.perf_counter(), time.process_time()
            step()
            seconds[name].append((time.perf_counter() - began, time.process_time() - busy))
    together = max(1, split.spec.shard_chunks)
    rows = [split.manifest[video] for video in range(min(images, 8 * together))]
    began = time.perf_counter()
    with manifest.Appender(folder) as appender:
        for first in range(0, len(rows), together):
            appender.append(*rows[first : first + together])
    appended = time.perf_counter() - began
    files = sum(1 for file in (path / f"train/features/{TAP}").iterdir() if file.name != "zarr.json")
    return {
        "images": images,
        "files_of_an_array": files,
        "images_in_a_file": split.spec.shard_chunks,
        "seconds": {
            name: {
                kind: round(statistics.median(values), 3)
                for kind, values in zip(("clock", "processor"), zip(*taken, strict=True), strict=True)
            }
            for name, taken in seconds.items()
        },
        "manifest_bytes_a_row": round((split.path / manifest.NAME).stat().st_size / images),
        "specification_bytes_an_image": round((split.path / "zarr.json").stat().st_size / images),
        "appending_microseconds_a_row": round(1e6 * appended / len(rows), 1),
        "rates": [rate.as_dict() for rate in measure_stream(split, TAP, residence="disk", rounds=5, cold=False)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--extracted", type=int, default=2_000)
    parser.add_argument("--stored", type=int, default=118_000)
    parser.add_argument("--skip-extraction", action="store_true", help="the store alone")
    parser.add_argument("--folder", type=Path, help="where to make them; default: the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures: dict[str, object] = {"store": stored(Path(folder), args.stored)}
        if not args.skip_extraction:
            photos = Path(folder) / "photos"
            make(photos, args.images)
            figures |= {"images": args.images, "seconds": seen(photos)}
            for count in (args.extracted // 10, args.extracted):
                measured = in_own_process(extracted, photos, Path(folder) / f"{count}.zarr", count)
                rate = count / measured["seconds"]
                figures[f"extraction of {count}"] = {
                    "images_a_second": round(rate, 1),
                    "peak_anonymous_mb": measured["peak_anonymous_mb"],
                }
    report("many_images", figures)


if __name__ == "__main__":
    main()
