"""One file of pictures of any kind: a photo, an image of several pages, or a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources import images, video_file
from featcache.sources.video import Size

KNOWN = " ".join(sorted(video_file.SUFFIXES | images.SUFFIXES | images.PERHAPS))


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix, or by its content if that is .ts."""
    suffix = path.suffix.lower()
    return suffix in video_file.SUFFIXES and (suffix != ".ts" or _is_transport_stream(path))


def is_image(path: Path) -> bool:
    """Whether a file is an image that this machine can read, by its suffix."""
    suffix = path.suffix.lower()
    return suffix in images.SUFFIXES or (suffix in images.PERHAPS and images.can_read(path))


def _is_transport_stream(path: Path) -> bool:
    """Whether a .ts file is video and not TypeScript: its packets of 188 bytes all begin with 0x47."""
    try:
        with path.open("rb") as file:
            start = file.read(189)
    except OSError:
        return True  # its reader will report the error
    return start[:1] == start[188:] == b"G"


def listed(left_out: Mapping[str, int]) -> str:
    """Counts of files by suffix as text, with a hint on how to read HEIF."""
    hint = "; for HEIF: pip install 'slotlab[heif]'" if images.HEIF.intersection(left_out) else ""
    return ", ".join(f"{count} {suffix}" for suffix, count in left_out.items()) + hint


def has_pages(path: Path) -> bool:
    """Whether an image file holds several frames; False if it cannot be read, which its reader will report."""
    try:
        return images.read_header(path).pages > 1
    except DataError:
        return False


def count_frames(path: Path) -> int:
    """Number of frames that ``read_frames`` returns."""
    return video_file.count_frames(path) if is_video(path) else images.read_header(path).pages


def frame_size(path: Path) -> Size:
    """Height and width of a file's frames, upright. At most the first frame is decoded."""
    return video_file.frame_size(path) if is_video(path) else images.read_header(path).turned()


def read_frames(path: Path, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
    """All frames of a file, upright -> (T, H, W, 3). ``DataError`` if it is damaged or too large.

    The sides may be up to ``shrink`` times smaller than the file's.
    """
    if is_video(path):
        return video_file.read_frames(path, shrink)
    header = images.read_header(path)
    if 3 * header.pages * header.size[0] * header.size[1] / shrink**2 > images.MAX_BYTES:
        raise DataError(
            f"{path}: {header.pages} pages of {header.size[1]}x{header.size[0]} are over {images.MAX_BYTES >> 30} "
            "GiB; have them scaled down (--frame-size 512), or save them as a folder of images"
        )
    frames = images.decode_pages(read_bytes(path), str(path), shrink)
    return images.stack(frames, [f"{path}: page {i}" for i in range(len(frames))])


def read_images(paths: Sequence[Path], shrink: float = 1.0) -> npt.NDArray[np.uint8]:
    """One frame of each image file, upright -> (T, H, W, 3); the sides may be up to ``shrink`` times smaller."""
    return images.stack(
        [images.decode_image(read_bytes(p), str(p), shrink=shrink) for p in paths], [str(p) for p in paths]
    )


def read_bytes(path: Path) -> bytes:
    """The content of a file. ``DataError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
