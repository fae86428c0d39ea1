"""Sound files of every kind that is read, and how others read them."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from tests.media import CONTAINER_AND_CODEC, oblong, save_clip
from tests.movi_files import write_movi

FRAMES = 12
LIMIT = 20.0  # seconds of a case

Arrays = list[npt.NDArray[Any]]  # of each video in turn: frames, and masks where it has some
Others = Callable[[Path, Arrays], Arrays | None]  # what others read; None where they complain


# -- sound files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    name: str
    make: Callable[[Path], tuple[Path, Path]]  # in an empty folder: what is opened, and the file to damage
    others: Others


def moving() -> npt.NDArray[np.uint8]:
    return np.stack([np.roll(oblong(1)[0], 3 * t, axis=1) for t in range(FRAMES)])


def numbers() -> npt.NDArray[np.uint8]:
    """Masks (T, H, W)."""
    return (moving()[..., 0] // 50).astype(np.uint8)


def clip(container: str, codec: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        path = save_clip(folder, container, codec, moving())
        return path, path

    return make


def image(name: str, mode: str = "RGB", pages: int = 1, **how: Any) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        frames = moving()[:pages]
        if mode == "I;16":
            first, *more = (Image.fromarray(frame[..., 0].astype(np.uint16) * 257) for frame in frames)
        else:
            first, *more = (Image.fromarray(frame).convert(mode) for frame in frames)
        first.save(folder / name, **({"save_all": True, "append_images": more} if more else {}), **how)
        return folder / name, folder / name

    return make


def masked(name: str, mode: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        for place, frame, mask in zip(range(2), moving(), numbers(), strict=False):
            for path, values in ((folder / "walk", frame), (folder / "masks" / "walk", mask)):
                path.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(values)
                if values.ndim == 2 and mode == "P":
                    picture.putpalette(list(range(255)) * 3)
                elif values.ndim == 2:
                    picture = Image.fromarray(values > 2) if mode == "1" else picture
                picture.save(path / (f"{place}.png" if values.ndim == 3 else f"{place}{name}"))
        return folder, folder / "masks" / "walk" / f"0{name}"

    return make


def hdf5(**how: Any) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("video", data=moving()[None], **how)
            file.create_dataset("mask", data=numbers()[None], **how)
        return folder / "a.h5", folder / "a.h5"

    return make


def tfrecord(folder: Path) -> tuple[Path, Path]:
    movi = write_movi(folder / "movi", {"train": 2})
    return movi, next(movi.glob("*.tfrecord-*"))


# -- what others read --------------------------------------------------------------------------------------


def same(some: Arrays, others: Arrays) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def by_ffmpeg(path: Path, ours: Arrays) -> Arrays | None:
    height, width = ours[0].shape[1:3]
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(path), "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "bicubic", "-"]
    read = subprocess.run(command, capture_output=True, check=False, timeout=LIMIT)
    # What the writer of raw pictures says of their times is no complaint about the pictures.
    complaints = [line for line in read.stderr.splitlines() if line and not line.startswith(b"[rawvideo @")]
    if read.returncode or complaints or len(read.stdout) % (height * width * 3):
        return None
    return [np.frombuffer(read.stdout, np.uint8).reshape(-1, height, width, 3)]


def by_ffmpeg_or_libjpeg(path: Path, ours: Arrays) -> Arrays | None:
    """FFmpeg's versions differ in what they notice: libjpeg may agree with the one at hand.

    Brightness is compared at full size, colours at half of it, where libjpeg has them as the file does (4:2:0)."""
    import av

    theirs = by_ffmpeg(path, ours)
    if theirs is not None and same(ours, theirs):
        return theirs
    try:
        with av.open(str(path)) as opened:
            packets = [packet for packet in opened.demux(opened.streams.video[0]) if packet.size]
            shown = [(bytes(packet), frame) for packet in packets for frame in packet.decode()]
        alike = [
            np.abs(channel.astype(int) - np.asarray(plane)).max() <= 8
            for data, frame in shown
            for channel, plane in zip(_planes_by_libjpeg(data), _planes(frame), strict=True)
        ]
        read = np.stack([frame.to_ndarray(format="rgb24") for _, frame in shown])
        return ours if all(alike) and same(ours, [read]) else theirs
    except Exception:
        return theirs


def _planes_by_libjpeg(data: bytes) -> list[npt.NDArray[np.uint8]]:
    channels = []
    for shrink in (1, 2):
        image = Image.open(io.BytesIO(data))
        image.draft("YCbCr", (image.width // shrink, image.height // shrink))
        channels.append(np.asarray(image))
    return [channels[0][..., 0], channels[1][..., 1], channels[1][..., 2]]


def _planes(frame: Any) -> list[npt.NDArray[np.uint8]]:
    return [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in frame.planes]


def by_pillow(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with Image.open(path) as opened:
            frames = []
            for page in ImageSequence.Iterator(opened):
                grey = page.mode.startswith("I")
                shown = Image.fromarray((np.asarray(page) >> 8).astype(np.uint8)) if grey else page
                frames.append(np.asarray(shown.convert("RGB")))
        return [np.stack(frames)]
    except Exception:
        return None


def mask_by_pillow(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with Image.open(path) as opened:
            mask = np.asarray(opened)
        return [ours[0], np.stack([mask.astype(np.uint8), ours[1][1]])]
    except Exception:
        return None


def by_h5py(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with h5py.File(path) as file:
            return [file["video"][0], *([file["mask"][0]] if "mask" in file else [])]
    except Exception:
        return None


def by_nobody(path: Path, ours: Arrays) -> Arrays | None:
    return None


KINDS: tuple[Kind, ...] = (
    *(
        Kind(f"{container}/{codec}", clip(container, codec), by_ffmpeg_or_libjpeg if codec == "mjpeg" else by_ffmpeg)
        for container, codec in CONTAINER_AND_CODEC
    ),
    Kind("gif", image("a.gif", "P", 4), by_ffmpeg),
    Kind("png", image("a.png"), by_pillow),
    Kind("png, palette", image("a.png", "P"), by_pillow),
    Kind("png, 16 bits", image("a.png", "I;16"), by_pillow),
    Kind("apng", image("a.apng", pages=4, format="PNG"), by_pillow),
    Kind("jpeg", image("a.jpg"), by_pillow),
    Kind("jpeg, progressive", image("a.jpg", progressive=True), by_pillow),
    Kind("tiff, raw, pages", image("a.tif", pages=4), by_pillow),
    Kind("tiff, deflate, pages", image("a.tif", pages=4, compression="tiff_adobe_deflate"), by_pillow),
    Kind("tiff, lzw", image("a.tif", compression="tiff_lzw"), by_pillow),
    Kind("webp", image("a.webp"), by_pillow),
    Kind("webp, lossless, animated", image("a.webp", pages=4, lossless=True), by_pillow),
    Kind("bmp", image("a.bmp"), by_pillow),
    Kind("ppm", image("a.ppm"), by_pillow),
    Kind("mask, png", masked(".png", "L"), mask_by_pillow),
    Kind("mask, png palette", masked(".png", "P"), mask_by_pillow),
    Kind("mask, png 1 bit", masked(".png", "1"), mask_by_pillow),
    Kind("mask, tiff", masked(".tif", "L"), mask_by_pillow),
    Kind("mask, bmp", masked(".bmp", "L"), mask_by_pillow),
    Kind("hdf5", hdf5(), by_h5py),
    Kind("hdf5, gzip", hdf5(compression="gzip", chunks=True), by_h5py),
    Kind("hdf5, gzip, checksums", hdf5(compression="gzip", chunks=True, fletcher32=True), by_h5py),
    Kind("tfrecord", tfrecord, by_nobody),
)
