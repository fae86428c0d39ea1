"""Writes masks: palette PNGs of slot numbers, one COCO file of run lengths, or frames overlaid with the masks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.store.durable import make_directory, write_output
from featcache.text import file_name
from slotlab.masks.labels import UNSEEN, fine_labels
from slotlab.pictures.coco import encode
from slotlab.pictures.palette import slot_colours
from slotlab.runs.loaded import LoadedRun
from slotlab.words import MaskFormat, Refinement

COCO_NAME = "masks.json"
TINT = 0.55  # share of the slot's colour in an overlay

Pictures = npt.NDArray[np.uint8]  # (T, H, W, 3)
Progress = Callable[[str, int, int], None]  # name, frames done, frames in all


@dataclass(frozen=True)
class Masked:
    """The frames of one video with the slot of each pixel."""

    name: str  # name of its files
    frames: Pictures  # (T, H, W, 3)
    labels: npt.NDArray[np.uint8]  # (T, H, W), below ``slots``, or UNSEEN
    slots: int


def store_masks(
    loaded: LoadedRun,
    split_name: str | None = None,
    videos: int | None = None,
    method: Refinement | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[Masked]:
    """A run's labels for the videos of a split, or for ``videos`` of them spread over it. Needs no ground truth."""
    split = loaded.split(split_name)
    chosen = split.videos if videos is None else split.spread(videos)
    total, done = sum(split.spec.lengths[video] for video in chosen), 0
    for video in chosen:
        frames = split.video(video)
        masks = loaded.segment(split, video).masks_on_grid  # (T, K, h, w)
        name = f"{video:04d}-{split.manifest[video].id}"
        yield Masked(name, frames, fine_labels(masks, frames, method), masks.shape[1])
        done += len(frames)
        progress(split.name, done, total)


class MaskWriter:
    """Writes videos' masks below a folder, in one format. Use it in a ``with`` statement.

    ``png`` and ``overlay-png`` give ``NAME/00000.png`` and so on, ``overlay-mp4`` and ``overlay-gif`` one file per
    video, ``rle`` one COCO file for all videos, ``masks.json``, at the end.
    """

    def __init__(self, folder: Path, form: MaskFormat, frames_a_second: float = 12.0) -> None:
        self.folder, self.form, self.rate = folder, form, frames_a_second
        self.files = 0
        self._coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        make_directory(folder.absolute())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.form == "rle" and kind is None:
            write_output(self.folder / COCO_NAME, json.dumps(self._coco))
            self.files += 1

    def add(self, masked: Masked) -> None:
        name = file_name(masked.name)
        if self.form == "rle":
            self._add_coco(name, masked)
            return
        if self.form in ("overlay-mp4", "overlay-gif"):
            pictures = overlay(masked)
            path = self.folder / f"{name}.{self.form.removeprefix('overlay-')}"
            write_output(path, (mp4 if self.form == "overlay-mp4" else gif)(pictures, self.rate))
            self.files += 1
            return
        drawn = overlay(masked) if self.form == "overlay-png" else masked.labels
        for index, picture in enumerate(drawn):
            image = Image.fromarray(picture) if picture.ndim == 3 else label_image(picture, masked.slots)
            write_output(self.folder / name / f"{index:05d}.png", as_file([image], "PNG"))
        self.files += len(drawn)

    def _add_coco(self, name: str, masked: Masked) -> None:
        coco = self._coco
        for slot in range(len(coco["categories"]), masked.slots):
            coco["categories"].append({"id": slot + 1, "name": f"slot {slot}"})
        height, width = masked.labels.shape[1:]
        for index, labels in enumerate(masked.labels):
            image = {"id": len(coco["images"]) + 1, "file_name": f"{name}/{index:05d}.png", "video": name}
            coco["images"].append(image | {"frame": index, "height": height, "width": width})
            for slot in np.unique(labels[labels < masked.slots]).tolist():
                mask = labels == slot
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": image["id"],
                        "category_id": slot + 1,  # COCO counts from 1
                        "segmentation": encode(mask),
                        "area": int(mask.sum()),
                        "bbox": [int(value) for value in box],
                        "iscrowd": 0,
                    }
                )


def label_image(labels: npt.NDArray[np.uint8], slots: int) -> Image.Image:
    """A palette image of slot numbers (H, W): its pixels are the numbers, shown in the slots' colours."""
    image = Image.frombytes("P", (labels.shape[1], labels.shape[0]), np.ascontiguousarray(labels).tobytes())
    image.putpalette(slot_colours(slots).ravel().tolist())
    return image


def overlay(masked: Masked) -> Pictures:
    """Frames (T, H, W, 3) tinted by slot, except the largest (the background), with light lines between slots."""
    pixels = np.bincount(masked.labels.ravel(), minlength=UNSEEN + 1)[: masked.slots]
    tint = np.zeros(UNSEEN + 1, np.float32)
    tint[: masked.slots] = np.where(np.arange(masked.slots) == pixels.argmax(), 0.0, TINT)
    colours = slot_colours(UNSEEN + 1).astype(np.float32)
    drawn = np.empty_like(masked.frames)
    for index, (frame, labels) in enumerate(zip(masked.frames, masked.labels, strict=True)):
        share = tint[labels][..., None]
        picture = frame * (1 - share) + colours[labels] * share
        edge = np.zeros(labels.shape, bool)
        edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        edge[1:] |= labels[1:] != labels[:-1]
        picture[edge] = 245
        drawn[index] = picture.round().astype(np.uint8)
    return drawn


def mp4(pictures: Pictures, rate: float) -> bytes:
    """An H.264 file that every browser plays; an odd side repeats its last pixels."""
    import av

    odd = [(0, side % 2) for side in pictures.shape[1:3]]
    pictures = np.pad(pictures, ((0, 0), *odd, (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def gif(pictures: Pictures, rate: float) -> bytes:
    """A GIF that repeats."""
    return as_file([Image.fromarray(picture) for picture in pictures], "GIF", duration=round(1000 / rate), loop=0)


def webp(pictures: Pictures, rate: float) -> bytes:
    """An animated WebP that repeats."""
    return as_file([Image.fromarray(picture) for picture in pictures], "WEBP", duration=round(1000 / rate), loop=0)


def as_file(images: Sequence[Image.Image], kind: str, **how: Any) -> bytes:
    """The bytes of an image file of one or several pages, in one of Pillow's formats."""
    buffer = io.BytesIO()
    pages = {"save_all": True, "append_images": images[1:]} if images[1:] else {}
    images[0].save(buffer, kind, **pages, **how)
    return buffer.getvalue()


FILMS: dict[str, Callable[[Pictures, float], bytes]] = {".mp4": mp4, ".gif": gif, ".webp": webp}  # by a file's ending
