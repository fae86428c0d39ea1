"""One video file, through PyAV (FFmpeg)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.sources.images import stack

SUFFIXES = frozenset((".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".m4v", ".mpg", ".mpeg"))
# Codecs whose containers hold one packet a shown frame: counting these need not decode. VP8 and packed
# MPEG-4 hide or join frames.
PACKET_IS_FRAME = frozenset(("h264", "hevc", "vp9", "av1", "mjpeg", "gif", "prores", "ffv1"))
REMEDY = "copy it again, or encode it anew (ffmpeg -i FILE new.mp4)"
SKEW = 0.0175  # of a display matrix, about one degree: less is rounding, as it is to ffmpeg
MAX_BYTES = 4 << 30  # of decoded frames: a video is read whole, and extraction holds several


def count_frames(path: Path) -> int:
    """Frames that ``read_frames`` gives, decoding only where the container cannot tell."""
    with _opened(path) as (container, stream):
        if stream.codec_context.name in PACKET_IS_FRAME:
            frames = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        else:
            frames = sum(1 for _ in container.decode(stream))
    if not frames:
        raise DataError(f"{path}: holds no frame; record or copy it again")
    return frames


def read_frames(path: Path) -> npt.NDArray[np.uint8]:
    """All frames, turned upright -> (T, H, W, 3). ``DataError`` for damaged, changing or over-long videos."""
    expected = count_frames(path)
    frames: list[npt.NDArray[np.uint8]] = []
    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = 1  # callers decode several videos side by side
        for frame in container.decode(stream):
            image = _upright(frame.to_ndarray(format="rgb24"), _display_matrix(frame), path)
            if image.nbytes * expected > MAX_BYTES:
                raise DataError(
                    f"{path}: {expected} frames of {image.shape[1]}x{image.shape[0]} are over {MAX_BYTES >> 30} GiB; "
                    "cut it into clips (ffmpeg -i FILE -c copy -f segment -segment_time 10 clip%04d.mp4)"
                )
            frames.append(image)
    if len(frames) != expected:
        raise DataError(f"{path}: {len(frames)} of {expected} frames decode; {REMEDY}")
    return stack(frames, [f"{path}: frame {i}" for i in range(len(frames))])


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """``a b c d`` of a frame's display matrix: pixel (x, y) is shown at (ax + cy, bx + dy), but for a shift."""
    data = next((bytes(item) for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", data)
    return a, b, c, d


def _upright(
    image: npt.NDArray[np.uint8], matrix: tuple[int, int, int, int] | None, path: Path
) -> npt.NDArray[np.uint8]:
    """An image (H, W, 3) turned and mirrored as FFmpeg's own player and ``ffmpeg`` (autorotate) show it."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    lying = abs(b) > abs(a)
    across, down = (c, b) if lying else (a, d)  # what moves one pixel across and down in the picture shown
    others = (a, d) if lying else (b, c)
    if max(map(abs, others)) >= SKEW * min(abs(across), abs(down)):
        raise DataError(
            f"{path}: is to be shown at an angle that is no quarter turn; encode it upright (ffmpeg -i FILE new.mp4)"
        )
    image = image.swapaxes(0, 1) if lying else image
    return np.ascontiguousarray(image[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and its first video stream; FFmpeg's errors become ``DataError``."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream in it; take it out of the folder")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); {REMEDY}") from error
