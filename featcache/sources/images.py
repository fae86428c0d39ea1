"""Decodes image files to upright arrays."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from featcache.errors import DataError
from featcache.sources.video import Size

SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm")
)
# Formats that Pillow reads on some machines only; their files count as images where it does.
HEIF = frozenset((".heic", ".heif", ".hif"))
PERHAPS = HEIF | {".avif", ".avifs", ".jp2", ".j2k"}
PAGED = frozenset(("TIFF", "PNG", "WEBP", "AVIF"))  # formats whose further images are frames, not previews
LYING = frozenset((5, 6, 7, 8))  # EXIF orientations that swap height and width
# Pillow's limit for a picture, of which it warns: a quarter of a GiB decoded. It refuses twice that.
MOST_PIXELS: int = Image.MAX_IMAGE_PIXELS or 1 << 26
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # who stores a picture looks at its size
LARGE = 1 << 24  # pixels of a picture from which it is worth while to decode it smaller: 50 MB
MAX_BYTES = 4 << 30  # of decoded frames: a video is read whole, and extraction holds several
GAP = 2.0  # between a picture that is decoded smaller and what is made of it; as Pillow's own for thumbnails
# Where EXIF may hide in PNG files besides its own chunk: keywords of text chunks.
PNG_TEXTS_OF_EXIF = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")


@dataclass(frozen=True)
class Header:
    """The properties of an image file that are known before any pixel is decoded."""

    size: Size  # as stored
    orientation: int  # EXIF's: 1 is upright, 2 to 8 are turned or mirrored
    pages: int = 1  # images in the file; several make a video

    def turned(self, orientation: int | None = None) -> Size:
        """Height and width after turning by an EXIF orientation, by default the file's own."""
        lying = (self.orientation if orientation is None else orientation) in LYING
        return self.size[::-1] if lying else self.size


def can_read(path: Path) -> bool:
    """Whether Pillow, or its HEIF plugin if installed, reads the file's format."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(DataError):
        read_header(path)
        return True
    return False


def read_header(path: Path) -> Header:
    """Size, orientation and pages of an image file. ``DataError`` if it is not one."""
    with errors_named(str(path)):
        state = path.stat()
        return _header(path, state.st_mtime_ns, state.st_size)


@lru_cache(1 << 16)  # scanning, sizes and remarks each read it, for all images and masks of a data set
def _header(path: Path, _changed: int, _size: int) -> Header:
    with path.open("rb") as file, Image.open(file) as image:
        pages = len(_pages(image))
        if image.format == "TIFF":  # Pillow turns these itself, and reports the size after turning
            image.seek(0)
            tags = image.tag_v2  # type: ignore[attr-defined]
            size, orientation = (int(tags[257]), int(tags[256])), tags.get(ExifTags.Base.Orientation, 1)
        else:
            size = image.size[::-1]
            # Looking for EXIF behind the pixels of a PNG, Pillow would decode them.
            may_turn = image.format != "PNG" or _png_has_exif(file)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if may_turn else 1
        return Header(size, orientation if orientation in range(1, 9) else 1, pages)


def _pages(image: Image.Image) -> list[int]:
    """Indices of the images in a file that are frames, without previews, masks and poster images."""
    pages = list(range(getattr(image, "n_frames", 1) if image.format in PAGED else 1))
    if len(pages) == 1:
        return pages
    if image.format == "TIFF":
        return [page for page in pages if not _is_lesser(image, page)] or [0]
    return pages[bool(getattr(image, "default_image", False)) :]  # without an APNG's picture for still viewers


def _is_lesser(image: Image.Image, page: int) -> bool:
    """Whether a page of a TIFF is a smaller copy or a transparency mask of another (NewSubfileType)."""
    image.seek(page)
    return bool(image.tag_v2.get(254, 0) & 0b101)  # type: ignore[attr-defined]


def _png_has_exif(file: BinaryIO) -> bool:
    """Whether any chunk of a PNG file may hold an orientation. Only the chunks' headers are read."""
    file.seek(8)
    while len(start := file.read(32)) >= 8:
        kind = start[4:8]
        if kind == b"eXIf" or (kind in (b"tEXt", b"zTXt", b"iTXt") and start[8:].startswith(PNG_TEXTS_OF_EXIF)):
            return True
        file.seek(int.from_bytes(start[:4], "big") + 12 - len(start), io.SEEK_CUR)
    return False


def decoded_smaller(size: Size, frames: int, factor: float) -> float:
    """The ``shrink`` with which to decode a video's pictures, whose sides will be ``factor`` times smaller in the end:
    1 where neither a picture nor all of them together are large."""
    pixels = size[0] * size[1]
    return max(1.0, factor / GAP) if pixels > LARGE or 3 * frames * pixels > MAX_BYTES else 1.0


@dataclass(frozen=True)
class Page:
    """One image of a file, decoded but not turned."""

    image: Image.Image
    name: str  # for errors
    packing: str  # Pillow's name for the pixel format in the file: "L;4" is grey of four bits
    levels: int  # largest grey value of that format; Pillow stretches it to 255 or 65535
    shrunk: float = 1.0  # each side, by the decoder


def decode_image(data: bytes, where: str, turn: bool = True, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
    """The first page of an image file that Pillow reads -> (H, W, 3), upright by its EXIF orientation.

    ``turn=False`` leaves it as the file stores it. With ``shrink`` its sides may be up to that many times smaller than
    the file's: a JPEG is then decoded so, others are averaged right after.
    """
    page = next(open_pages(data, where, shrink))
    return as_rgb(page.image, where, turn, shrink / page.shrunk)


def decode_pages(data: bytes, where: str, shrink: float = 1.0) -> list[npt.NDArray[np.uint8]]:
    """Every image of a TIFF, APNG or animated WebP, or the only one of other files -> (H, W, 3) each, upright."""
    pages = open_pages(data, where, shrink)
    return [as_rgb(page.image, page.name, shrink=shrink / page.shrunk) for page in pages]


def open_pages(data: bytes, where: str, shrink: float = 1.0) -> Iterator[Page]:
    """Each image of a file; it is valid until the next one is read. ``DataError`` if the file is damaged."""
    with errors_named(where):
        image = Image.open(io.BytesIO(data))
        pages = _pages(image)
    for page in pages:
        name = f"{where}: page {page}" if pages[1:] else where
        with errors_named(name):
            image.seek(page)
            wide = image.width
            if shrink > 1:
                image.draft(None, _shrunk(image.size, shrink))
            args = image.tile[0].args if image.tile else None
            packing, *more = (args,) if isinstance(args, str) else args or ("",)
            image.load()
        yield Page(image, name, packing, _levels(image, packing, more), wide / image.width)


def _shrunk(size: tuple[int, int], shrink: float) -> tuple[int, int]:
    return math.ceil(size[0] / shrink), math.ceil(size[1] / shrink)


def _levels(image: Image.Image, packing: str, more: Sequence[object]) -> int:
    if image.format == "PPM" and more and isinstance(more[-1], int):
        return more[-1]
    bits = re.search(r";(\d+)", packing)
    return (1 << int(bits[1])) - 1 if bits and image.mode == "L" else 65535 if image.mode.startswith("I") else 255


def as_rgb(image: Image.Image, where: str, turn: bool = True, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
    """An image of any mode as RGB (H, W, 3), upright by its EXIF orientation; its sides are averaged to a ``shrink``-th
    where that is 2 or more.

    16-bit grey is scaled to 8; ``DataError`` for values of unknown range.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):  # whose 16 bits come as 32
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise DataError(f"{where}: holds {kind} values, whose range is unknown; save it with 8 or 16 bits")
    with errors_named(where):
        image.load()
        turned = turn and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image  # which would copy it
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if shrink >= 2:
            upright = upright if upright.mode in ("L", "RGB") else upright.convert("RGB")
            upright = upright.resize(_shrunk(upright.size, shrink), Image.Resampling.BOX)
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


@contextmanager
def errors_named(where: str) -> Iterator[None]:
    """Turn the many errors that Pillow raises for a damaged file into ``DataError``."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: over {2 * MOST_PIXELS / 1e6:.0f} million pixels, which Pillow takes for a bomb; scale it down "
            "first (ffmpeg -i FILE -vf scale=4096:-1 new.png)"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # from the file system
            raise DataError(
                f"{where}: cannot be read ({error.strerror}); check the file and its permissions"
            ) from error
        raise DataError(
            f"{where}: image cannot be decoded ({error}); copy or make it again, "
            "or extract without its video (--skip-damaged)"
        ) from error


def stack(images: Sequence[npt.NDArray[np.uint8]], names: Sequence[str], what: str = "frame") -> npt.NDArray[np.uint8]:
    """Images of one size -> (T, ...). ``names`` say where each came from. ``DataError`` if sizes differ."""
    one_size([image.shape[:2] for image in images], names, what)
    return np.stack(images)


def one_size(sizes: Sequence[tuple[int, ...]], names: Sequence[str], what: str = "frame") -> None:
    """``DataError`` where sizes (height, width) differ within a video."""
    for size, name in zip(sizes, names, strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{name}: {what} is {size_text(size)}, but the video's first is {size_text(sizes[0])}; "
                f"bring all {what}s of a video to one size"
            )


def size_text(shape: Sequence[int]) -> str:
    """A shape (height, width, ...) as the text WIDTHxHEIGHT."""
    return f"{shape[1]}x{shape[0]}"
