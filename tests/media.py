"""Media files made on the spot, and what ffmpeg reads from them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.movi_files import scene

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is the authority, and is not here")

# EXIF orientation -> a, b, c, d of the display matrix that shows a picture so: pixel (x, y) at (ax + cy, bx + dy).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def save_images(folder: Path, frames: np.ndarray, names: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / (names[i] if names else f"{i}.png"))


def save_movie(path: Path, codec: str, frames: np.ndarray, pixels: str = "yuv420p", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


# Codecs by their containers, as PyAV encodes them here: encoder, pixel format, options.
ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "yuv420p", {"g": "6", "bf": "2"}),
    "hevc": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=6"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "12"}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
}
CONTAINERS = {
    "mp4": ("h264", "hevc", "vp9", "av1", "mjpeg"),
    "mkv": ("h264", "hevc", "vp9", "av1", "mjpeg"),
    "webm": ("vp9", "av1"),
    "avi": ("h264", "vp9", "av1", "mjpeg"),
    "mov": ("h264", "hevc", "mjpeg"),
}
CONTAINER_AND_CODEC = [(container, codec) for container, codecs in CONTAINERS.items() for codec in codecs]


def save_clip(folder: Path, container: str, codec: str, frames: np.ndarray) -> Path:
    """A clip in any of ``CONTAINER_AND_CODEC``."""
    os.environ["SVT_LOG"] = "0"  # the AV1 encoder talks
    encoder, pixels, options = ENCODERS[codec]
    path = save_movie(folder / f"{codec}.{container}", encoder, frames, pixels, **options)
    # Started by root, that encoder gives its caller a priority at which nothing else on the machine gets a turn.
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def set_display_matrix(path: Path, *abcd: float) -> None:
    """Write a display matrix into the first track header of an mp4 or mov file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # past the name, the version, times and layers
    a, b, c, d = (round(value * 65536) for value in abcd)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def copied(clip: Path, path: Path) -> Path:
    """The video stream of a file in another container, with its display matrix where that can hold one."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return path


def oblong(frames: int = 3, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames (T, H, W, 3) that no turn and no mirror image leaves as they are."""
    return np.stack([np.tile(scene(i, 1)[0][0], (3, 3, 1))[:height, :width] for i in range(frames)])


def ffmpeg_frames(path: Path, height: int, width: int) -> np.ndarray:
    """Frames (T, H, W, 3) of a video file, upright, by the ffmpeg program."""
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(path), "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "bicubic", "-"]
    read = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert not read.stderr, read.stderr
    return np.frombuffer(read.stdout, np.uint8).reshape(-1, height, width, 3)
