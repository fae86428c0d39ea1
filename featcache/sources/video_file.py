"""One video file, through PyAV (FFmpeg)."""

from __future__ import annotations

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
            image = frame.to_ndarray(format="rgb24")
            if turns := round(frame.rotation / 90) % 4:
                image = np.ascontiguousarray(np.rot90(image, turns))
            if image.nbytes * expected > MAX_BYTES:
                raise DataError(
                    f"{path}: {expected} frames of {image.shape[1]}x{image.shape[0]} are over {MAX_BYTES >> 30} GiB; "
                    "cut it into clips (ffmpeg -i FILE -c copy -f segment -segment_time 10 clip%04d.mp4)"
                )
            frames.append(image)
    if len(frames) != expected:
        raise DataError(f"{path}: {len(frames)} of {expected} frames decode; {REMEDY}")
    return stack(frames, [f"{path}: frame {i}" for i in range(len(frames))])


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
