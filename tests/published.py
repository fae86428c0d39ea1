"""Small data sets in the layouts that they are published in, written by the layouts' own descriptions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32


def picture(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save_picture(path: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, size)).save(path)


def as_stored(path: Path) -> np.ndarray:
    """The pixels of an image file by Pillow alone."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def voc_palette() -> list[int]:
    """The colours of VOC's development kit: the bits of a number, spread over those of red, green and blue."""
    colours = []
    for number in range(256):
        for channel in range(3):
            colours.append(sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)))
    return colours


def save_palette(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers.astype(np.uint8), "L")
    image.putpalette(voc_palette())  # makes it a palette image of the same numbers
    assert image.mode == "P"
    image.save(path)


def save_grey(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers.astype(np.uint8)).save(path)


def boxes(*corners: tuple[int, int, int, int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Numbers 1, 2, ... of boxes (top, left, bottom, right), a later one over an earlier one."""
    numbers = np.zeros(size, np.uint8)
    for number, (top, left, bottom, right) in enumerate(corners, start=1):
        numbers[top:bottom, left:right] = number
    return numbers


def write_list(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# -- DAVIS -------------------------------------------------------------------------------------------------


def davis_2016(root: Path, videos: Mapping[str, Mapping[str, int]]) -> Path:
    """Split -> video -> frames, as the 480p of 2016 has them: masks of 0 and 255, lists of pairs of paths."""
    for split, of in videos.items():
        lines = []
        for video, frames in of.items():
            for frame in range(frames):
                image, mask = f"/JPEGImages/480p/{video}/{frame:05d}.jpg", f"/Annotations/480p/{video}/{frame:05d}.png"
                save_picture(root / image[1:], frame)
                save_grey(root / mask[1:], 255 * (boxes((2, frame, 9, frame + 8)) > 0))
                lines.append(f"{image} {mask} ")
        write_list(root / "ImageSets" / "480p" / f"{split}.txt", lines)
    return root


def davis_2017(root: Path, videos: Mapping[str, Mapping[str, int]], annotations: str = "Annotations") -> Path:
    """The same in 2017's form: palette masks of two objects with a void column, lists of names."""
    for split, of in videos.items():
        for video, frames in of.items():
            for frame in range(frames):
                save_picture(root / "JPEGImages" / "480p" / video / f"{frame:05d}.jpg", frame)
                numbers = boxes((2, frame, 9, frame + 8), (10, 4, 20, 12 + frame))
                numbers[:, -1] = 255
                save_palette(root / annotations / "480p" / video / f"{frame:05d}.png", numbers)
        write_list(root / "ImageSets" / "2017" / f"{split}.txt", list(of))
    return root


# -- PASCAL VOC --------------------------------------------------------------------------------------------


def voc(root: Path, lists: Mapping[str, Sequence[str]], year: str = "2012") -> Path:
    """VOCdevkit with two objects, a dog and a person, and a void edge around the first, in every listed image."""
    home = root / f"VOC{year}"
    for split, names in lists.items():
        write_list(home / "ImageSets" / "Segmentation" / f"{split}.txt", names)
        for seed, name in enumerate(names):
            save_picture(home / "JPEGImages" / f"{name}.jpg", seed)
            objects = boxes((2, 2, 10, 12), (12, 6 + seed, 22, 30))
            void = (boxes((1, 1, 11, 13)) > 0) & (objects == 0)
            classes = np.array([0, 12, 15], np.uint8)[objects]
            save_palette(home / "SegmentationObject" / f"{name}.png", np.where(void, 255, objects))
            save_palette(home / "SegmentationClass" / f"{name}.png", np.where(void, 255, classes))
    return root


# -- COCO --------------------------------------------------------------------------------------------------

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "kitchen", "id": 90, "name": "toothbrush"},
]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, from a run of zeros on."""
    flat = mask.astype(bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def coco_image(number: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "height": size[0], "width": size[1], "license": 1}


def annotation(
    number: int, image: int, segmentation: Any, category: int = 1, crowd: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": int(crowd),
        "area": 1.0, "bbox": [0, 0, 1, 1], **more,
    }  # fmt: skip


def coco(
    root: Path, split: str, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]], year: str = "2017"
) -> Path:
    """Pictures and ``instances_*.json`` of one split; gives the file."""
    for image in images:
        save_picture(root / f"{split}{year}" / image["file_name"], image["id"], (image["height"], image["width"]))
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": CATEGORIES}
    return write_json(root / "annotations" / f"instances_{split}{year}.json", content)
