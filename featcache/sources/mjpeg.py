"""Whether a picture of a Motion JPEG video is damaged.

JPEG has no checksums, and a decoder goes on behind damage, often without a word: each in its own way, so that two of
them tell.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Channel = npt.NDArray[np.int16]

ROUNDING = 8  # levels by which sound decoders may differ; most do by one or two
END = b"\xff\xd9"  # some cameras leave it out
PLANAR = re.compile(r"yuvj?4\d\dp|gray")  # formats of a frame that has its channels one by one, of a byte each


def is_alike(packet: bytes, frame: Any) -> bool:
    """Whether libjpeg, by Pillow, reads a packet as FFmpeg did (a PyAV frame).

    True where they cannot be compared: other channels than YCbCr, or two fields in a packet. Raises what Pillow raises.
    """
    with Image.open(io.BytesIO(packet + END)) as image:
        if not PLANAR.fullmatch(frame.format.name) or image.size != (frame.width, frame.height):
            return True
        image.draft("YCbCr", None)
        image.load()
        theirs = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).astype(np.int16)  # (channel, H, W)
    return all(_as_plane(channel, plane) for channel, plane in zip(theirs, frame.planes, strict=False))


def _as_plane(theirs: Channel, plane: Any) -> bool:
    """Whether a channel (H, W) of libjpeg's is a plane of FFmpeg's, which may be stored at half the size."""
    ours = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].astype(np.int16)
    scale = 1  # of both, so that they stay whole
    for axis in (0, 1):
        if ours.shape[axis] == theirs.shape[axis]:
            continue
        if ours.shape[axis] != -(-theirs.shape[axis] // 2) or ours.shape[axis] < 3:
            return True  # a quarter, which libjpeg enlarges in another way
        # libjpeg enlarges by a triangle, three quarters of the near value and one of the far one. Of two values each,
        # that has the mean (before + 6 here + after) / 8.
        ours, theirs, scale = np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0), 8 * scale
        ours = 6 * ours + np.concatenate([ours[:1], ours[:-1]]) + np.concatenate([ours[1:], ours[-1:]])
        theirs = 4 * (theirs[:-1:2] + theirs[1::2])
        ours, theirs = np.moveaxis(ours[: len(theirs)], 0, axis), np.moveaxis(theirs, 0, axis)
    return bool(np.abs(theirs - ours).max() <= ROUNDING * scale)
