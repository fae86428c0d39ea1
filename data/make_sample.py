"""Make the embedded sample: re-code the frames of a MOVi data set in TFDS layout as JPEG.

    python data/make_sample.py SOURCE data/movi_a/256x256/1.0.0

SOURCE holds ``features.json``, ``dataset_info.json``, label files and TFRecord shards with PNG frames. Frames
become JPEG without chroma subsampling, masks are compressed anew where that makes them smaller, and everything
else in the records is copied. The same input and the same Pillow give the same bytes. Nothing outside of the two
folders is read or written.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from featcache.sources.tfrecord import OVERHEAD, TFRecordFile, write_records


def recode_frame(png: bytes, quality: int) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()


def recode_mask(png: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "PNG", optimize=True)
    return min(png, out.getvalue(), key=len)


def recode(record: bytes, quality: int) -> bytes:
    """One ``tf.train.Example``, its map in the order of its keys."""
    example: Any = tf_example_pb2.Example.FromString(record)
    video = example.features.feature["video"].bytes_list
    video.value[:] = [recode_frame(frame, quality) for frame in video.value]
    masks = example.features.feature["segmentations"].bytes_list
    masks.value[:] = [recode_mask(mask) for mask in masks.value]
    data: bytes = example.SerializeToString(deterministic=True)
    return data


def in_shards(records: list[bytes], limit: int) -> list[list[bytes]]:
    """The fewest shards of near-equal record counts, none above ``limit`` bytes (a record alone may be)."""
    for count in range(1, len(records) + 1):
        cuts = [round(i * len(records) / count) for i in range(count + 1)]
        shards = [records[a:b] for a, b in itertools.pairwise(cuts)]
        if max(sum(map(len, shard)) + OVERHEAD * len(shard) for shard in shards) <= limit:
            return shards
    return [[record] for record in records]


def read_split(source: Path, name: str, split: str) -> Iterator[bytes]:
    for path in sorted(source.glob(f"{name}-{split}.tfrecord-*")):
        file = TFRecordFile.open(path)
        yield from (file.read(i) for i in range(len(file)))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def make(source: Path, target: Path, quality: int, limit: int) -> None:
    info = json.loads((source / "dataset_info.json").read_text(encoding="utf-8"))
    features = json.loads((source / "features.json").read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob(f"{info['name']}-*.tfrecord-*"):
        stale.unlink()
    for split in info["splits"]:
        records = [recode(record, quality) for record in read_split(source, info["name"], split["name"])]
        shards = in_shards(records, limit)
        for i, shard in enumerate(shards):
            write_records(target / f"{info['name']}-{split['name']}.tfrecord-{i:05d}-of-{len(shards):05d}", shard)
        split["shardLengths"] = [str(len(shard)) for shard in shards]
        split["numBytes"] = str(sum(map(len, records)))
        print(f"{split['name']}: {len(records)} videos, {len(shards)} shards, {int(split['numBytes']) / 1e6:.1f} MB")
    features["featuresDict"]["features"]["video"]["video"]["encodingFormat"] = "jpeg"
    info["description"] += f" Frames are JPEG of quality {quality}, 4:4:4."
    write_json(target / "features.json", features)
    write_json(target / "dataset_info.json", info)
    for labels in source.glob("*.labels.txt"):
        (target / labels.name).write_bytes(labels.read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quality", type=int, default=92)
    parser.add_argument("--shard-bytes", type=int, default=4_500_000)
    options = parser.parse_args()
    make(options.source, options.target, options.quality, options.shard_bytes)
