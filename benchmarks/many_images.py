"""Many single images of mixed sizes: how long it takes to see what is there, and what their extraction takes.

    python -m benchmarks.many_images [--images 20000] [--extracted 2000] [--folder DIR]

The images are copies of a hundred JPEG and PNG files of 48 to 640 pixels a side, made for the purpose. Their
extraction, by a ResNet-18 with random weights at 32 px and frames of 64 px, runs in a separate process, whose anonymous
memory is sampled: for as many images as are given, and for a tenth of them, so that growth shows.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import report
from benchmarks.large_store import in_own_process
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--extracted", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, help="where to make them; default: the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        photos = Path(folder) / "photos"
        make(photos, args.images)
        figures: dict[str, object] = {"images": args.images, "seconds": seen(photos)}
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
