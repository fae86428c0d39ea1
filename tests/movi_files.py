"""Small MOVi data sets in TFDS layout, written on the spot as the official ones are: dense maps and all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from featcache.sources.tfrecord import write_records

NAMES = {
    "shape_label": ["cube", "cylinder", "sphere"],
    "size_label": ["small", "large"],
    "color_label": ["blue", "brown", "cyan", "gray"],
    "material_label": ["metal", "rubber"],
}
FRAMES, SIDE = 3, 24


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def scene(index: int, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, S, S, 3) and masks (T, S, S) of two squares; the second one is hidden in the first frame."""
    rng = np.random.default_rng(index)
    masks = np.zeros((frames, SIDE, SIDE), np.uint8)
    masks[:, 2:8, 3:9] = 1
    masks[1:, 10:16, 5 : 9 + index % 8] = 2
    colours = rng.integers(0, 256, (3, 3))
    return (colours[masks] // 2 + rng.integers(0, 12, (frames, SIDE, SIDE, 3))).astype(np.uint8), masks


def example(index: int, frames: int = FRAMES, edit: Callable[[Any], None] | None = None) -> bytes:
    message = tf_example_pb2.Example()
    feature = message.features.feature
    images, masks = scene(index, frames)
    feature["video"].bytes_list.value.extend(map(png, images))
    feature["segmentations"].bytes_list.value.extend(map(png, masks))
    feature["depth"].bytes_list.value.extend(b"unread" for _ in images)
    feature["forward_flow"].bytes_list.value.extend(b"unread" for _ in images)
    for name, known in NAMES.items():
        feature[f"instances/{name}"].int64_list.value.extend([index % len(known), (index + 1) % len(known)])
    pixels = [(masks == k).sum((1, 2)) for k in (1, 2)]
    feature["instances/visibility"].int64_list.value.extend(np.stack(pixels).ravel().tolist())
    feature["metadata/video_name"].bytes_list.value.append(f"scene_{index}".encode())
    if edit:
        edit(feature)
    data: bytes = message.SerializeToString()
    return data


def features(frames: int = FRAMES) -> dict[str, Any]:
    image = {"dtype": "uint8", "shape": {"dimensions": [str(SIDE), str(SIDE), "1"]}}
    labels = {name: {"classLabel": {"numClasses": str(len(known))}} for name, known in NAMES.items()}
    video = {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": [str(frames), "24", "24", "3"]}}
    return {
        "featuresDict": {
            "features": {
                "video": {"video": video},
                "segmentations": {"sequence": {"feature": {"image": image}, "length": str(frames)}},
                "depth": {"sequence": {"feature": {"image": image}, "length": str(frames)}},
                "instances": {"sequence": {"feature": {"featuresDict": {"features": labels}}, "length": "-1"}},
            }
        }
    }


def write_movi(folder: Path, splits: Mapping[str, int | list[bytes]], shards: int = 1, frames: int = FRAMES) -> Path:
    """``splits``: name -> number of scenes, or the records themselves. ``frames`` is what features.json says."""
    folder.mkdir(parents=True)
    info: dict[str, Any] = {"name": "movi_a", "version": "1.0.0", "description": "test", "splits": []}
    for split, content in splits.items():
        records = [example(i) for i in range(content)] if isinstance(content, int) else content
        parts = [part.tolist() for part in np.array_split(np.array(records, object), shards)]
        for i, part in enumerate(parts):
            write_records(folder / f"movi_a-{split}.tfrecord-{i:05d}-of-{shards:05d}", part)
        info["splits"].append({"name": split, "shardLengths": [str(len(part)) for part in parts]})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features(frames)))
    for name, known in NAMES.items():
        (folder / f"instances-{name}.labels.txt").write_text("\n".join(known) + "\n")
    return folder
