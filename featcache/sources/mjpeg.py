"""Whether a picture of a Motion JPEG video is damaged.

JPEG has no checksums, and a decoder goes on behind damage, often without a word: each in its own way, so that two of
them tell.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import Image

ROUNDING = 8  # levels by which sound decoders may differ; most do by one or two
END = b"\xff\xd9"  # some cameras leave it out
WITH_BRIGHTNESS = re.compile(r"yuvj?4\d\dp|gray")  # formats of a frame whose first plane is its brightness


def is_alike(packet: bytes, frame: Any) -> bool:
    """Whether libjpeg, by Pillow, reads the brightness of a packet as FFmpeg did (a PyAV frame).

    True where they cannot be compared: other colours than YCbCr, or two fields in a packet. Raises what Pillow raises.
    """
    with Image.open(io.BytesIO(packet + END)) as image:
        if not WITH_BRIGHTNESS.fullmatch(frame.format.name) or image.size != (frame.width, frame.height):
            return True
        image.draft("L", None)
        theirs = np.asarray(image.convert("L"), np.int16)
    plane = frame.planes[0]
    ours = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    return bool(np.abs(theirs - ours).max() <= ROUNDING)
