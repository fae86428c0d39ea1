"""Reads one video file through PyAV (FFmpeg): every frame, upright, or an error.

FFmpeg plays on after damage: it fills lost areas from their neighbours, skips what it cannot decode, and ends where a
file was cut off. So a file is refused if FFmpeg logs an error or a warning of damage, marks a packet or a frame as
corrupt, reads another JPEG than libjpeg, or returns clearly fewer frames than the container promises.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import DataError
from featcache.sources import ends, gif, mjpeg, mp4, nal
from featcache.sources.images import MAX_BYTES, as_rgb, errors_named, stack
from featcache.sources.video import Size

SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv"),
        *(".mpg", ".mpeg", ".mpe", ".vob", ".ts", ".mts", ".m2ts", ".ogv", ".mxf", ".y4m", ".gif"),
    )
)
# Codecs with one packet per shown frame, so that frames are counted without decoding. VP8 and packed MPEG-4 hide or
# join frames.
PACKET_IS_FRAME = frozenset(("h264", "hevc", "vp9", "av1", "mjpeg", "prores", "ffv1"))
NO_PROMISE = frozenset(("mpegts", "mpeg"))  # streams whose header does not record their length
ORDERED = frozenset(("mp4", "matroska"))  # containers that keep the time at which each frame is shown
REMEDY = "copy it again, encode it anew (ffmpeg -i FILE new.mp4), or extract without it (--skip-damaged)"
SKEW = 0.0175  # skew of a display matrix, about one degree, below which it is rounding, as in ffmpeg
ERROR, WARNING = 16, 24  # FFmpeg's log levels
# Warnings of damage among many harmless ones. Corrupt packets are marked, and may be another stream's.
OF_DAMAGE = re.compile(r"(?!Packet corrupt).*(corrupt|truncat|reached eof)", re.IGNORECASE | re.DOTALL)
ALONE = 0.5  # seconds in place of the time between two frames, where there is but one
MOST_DELAY = 16.0  # seconds beyond a video's length by which a frame may follow its data: a frame a second, 16 ahead


def count_frames(path: Path) -> int:
    """Number of frames that ``read_frames`` returns; decodes only if the container does not tell.

    ``DataError`` if the container or its duration promises clearly more than there is.
    """
    with _opened(path) as clip:
        if clip.is_gif:
            return len(list(clip.packets()))
        counts = clip.codec in PACKET_IS_FRAME
        shown = held = 0
        delay = 0.0  # the most seconds from decoding a frame to showing it; several frames, unless a table is damaged
        begin, end, before, gap = float("inf"), float("-inf"), None, 0.0  # seconds; `gap` between two frames
        seen, hides = 0.0, False  # seconds that are shown; whether an edit list hides others
        last = 0  # where the data of the last frame end
        for packet in clip.container.demux():
            if packet.pts is not None:
                start = float(packet.pts * packet.time_base)
                begin, end = min(begin, start), max(end, start + float((packet.duration or 0) * packet.time_base))
            if packet.stream_index != clip.stream.index:
                continue
            if packet.size:
                held += 1
                last = (packet.pos or 0) + packet.size
                shown += not packet.is_discard if counts else 0
                seen += 0.0 if packet.is_discard else float((packet.duration or 0) * packet.time_base)
                hides = hides or packet.is_discard
                if packet.dts is not None and packet.pts is not None:
                    delay = max(delay, float(abs(packet.pts - packet.dts) * packet.time_base))
                if packet.dts is not None:
                    now = float(packet.dts * packet.time_base)
                    gap, before = max(gap, now - (now if before is None else before)), now
            if not counts:
                shown += sum(1 for _ in clip.decode(packet))
        promised, length = clip.stream.frames, (clip.container.duration or 0) / 1e6
        name = clip.container.format.name
        meant = float((clip.stream.duration or 0) * clip.stream.time_base)  # by the edit list, where there is one
        gap = gap if held > 1 else ALONE
        if name == "avi" and before and clip.stream.time_base:  # promises empty packets, too: they repeat a frame
            held = max(held, round((before + gap) / float(clip.stream.time_base)))
    if "mov" in name and (broken := mp4.broken_table(path)):
        raise DataError(f"{path}: is damaged ({broken}); {REMEDY}")
    if unfinished := ends.unfinished(path, name, last):
        raise DataError(f"{path}: is damaged ({unfinished}); {REMEDY}")
    if length and delay > length + MOST_DELAY:
        raise DataError(f"{path}: is damaged (a frame is shown {delay:.0f} seconds off its place); {REMEDY}")
    if promised and held < promised - max(1, promised // 50):
        # An edit list that shows a part of a film may keep the rest from being read at all.
        held = max(held, _packets_behind_edit_lists(path)) if "mov" in name else held
        if held < promised - max(1, promised // 50):
            raise DataError(f"{path}: holds {held} of the {promised} frames that it promises; {REMEDY}")
    if hides and not meant:
        raise DataError(f"{path}: is damaged (it hides frames, and does not say how long it is); {REMEDY}")
    if hides and seen < 0.98 * meant - 2 * gap:
        raise DataError(f"{path}: shows {seen:.1f} of the {meant:.1f} seconds that it promises; {REMEDY}")
    if not promised and name not in NO_PROMISE and end - begin < 0.98 * length - 2 * gap:
        raise DataError(f"{path}: ends after {end - begin:.1f} of the {length:.1f} seconds that it promises; {REMEDY}")
    if name == "asf" and not length:  # FFmpeg drops a duration whose header gives another file size
        raise DataError(f"{path}: its size is not the one in its header, or it was never finished; {REMEDY}")
    if not shown:
        raise DataError(f"{path}: holds no frame; record or copy it again")
    return shown


def frame_size(path: Path) -> Size:
    """Height and width of the first frame, upright; its rotation is stored with the frame, not in the header."""
    with _opened(path) as clip:
        for packet in clip.packets():
            for frame in clip.decode(packet):
                shape = _upright(np.empty((frame.height, frame.width, 0), np.uint8), _display_matrix(frame), path).shape
                clip.heard.clear()  # damage is judged when all frames are read
                return shape[0], shape[1]
    raise DataError(f"{path}: holds no frame; record or copy it again")


def read_frames(path: Path, shrink: float = 1.0) -> npt.NDArray[np.uint8]:
    """All frames, turned upright -> (T, H, W, 3); their sides are averaged to a ``shrink``-th where that is 2 or more.

    ``DataError`` for damaged, changing or over-long videos.
    """
    expected = count_frames(path)
    frames: list[npt.NDArray[np.uint8]] = []
    first = None  # the display matrix
    with _opened(path) as clip:
        ordered, last = not ORDERED.isdisjoint(clip.container.format.name.split(",")), None
        for packet in clip.packets():
            for frame in clip.decode(packet):
                if ordered and last is not None and frame.pts is not None and frame.pts < last:
                    second = float(frame.pts * clip.stream.time_base)
                    raise DataError(f"{path}: its frames are out of order near second {second:.1f}; {REMEDY}")
                last = frame.pts if frame.pts is not None else last
                matrix = _display_matrix(frame)
                first = first if frames else matrix
                if matrix != first:  # H.264 and HEVC may hold one for each frame
                    second = float((frame.pts or 0) * clip.stream.time_base)
                    raise DataError(
                        f"{path}: its display matrix changes near second {second:.1f}; encode it with one "
                        "(ffmpeg -noautorotate -i FILE new.mp4 leaves it out)"
                    )
                image = _upright(frame.to_ndarray(format="rgb24"), matrix, path)
                image = image if shrink < 2 else as_rgb(Image.fromarray(image), str(path), turn=False, shrink=shrink)
                if image.nbytes * expected > MAX_BYTES:
                    raise DataError(
                        f"{path}: {expected} frames of {image.shape[1]}x{image.shape[0]} are over "
                        f"{MAX_BYTES >> 30} GiB; have them scaled down (--frame-size 512), or cut it into clips "
                        "(ffmpeg -i FILE -c copy -f segment -segment_time 10 clip%04d.mp4)"
                    )
                frames.append(image)
    if len(frames) != expected:
        raise DataError(f"{path}: {len(frames)} of {expected} frames decode; {REMEDY}")
    return stack(frames, [f"{path}: frame {i}" for i in range(len(frames))])


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """``a b c d`` of a frame's display matrix: pixel (x, y) is shown at (ax + cy, bx + dy), up to a shift."""
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
        raise DataError(f"{path}: its display matrix is not a quarter turn; encode it upright (ffmpeg -i FILE new.mp4)")
    image = image.swapaxes(0, 1) if lying else image
    return np.ascontiguousarray(image[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])


# -- FFmpeg ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clip:
    """An open file."""

    path: Path
    container: Any
    stream: Any  # its first video stream
    heard: list[tuple[int, str, str]]  # FFmpeg's errors and warnings: level, who, message

    @property
    def codec(self) -> str:
        """Name of the format, such as av1, not of its decoder, such as libdav1d."""
        name: str = self.stream.codec_context.codec.canonical_name
        return name

    @property
    def is_gif(self) -> bool:
        return bool(self.container.format.name == "gif")

    def packets(self) -> Iterator[Any]:
        """The packets of the video stream."""
        if not self.is_gif:
            yield from self.container.demux(self.stream)
            return
        import av

        try:
            pictures = gif.pictures(self.path.read_bytes())
        except ValueError as error:
            raise DataError(f"{self.path}: is damaged ({error}); {REMEDY}") from error
        if not pictures:
            raise DataError(f"{self.path}: holds no frame; record or copy it again")
        for data in pictures:
            packet = av.Packet(data)
            packet.stream = self.stream
            yield packet

    def decode(self, packet: Any) -> Iterator[Any]:
        """The packet's frames. Errors of a packet that an edit list hides are ignored."""
        if not packet.size and packet.dts is not None:  # repeats the last frame, as ffmpeg does itself
            return
        before = len(self.heard)
        in_units = self.codec in nal.CODECS and packet.size and not packet.is_discard
        if in_units and nal.has_hole(bytes(packet), self.stream.codec_context.extradata, self.codec):
            raise self._damaged(packet)
        frames = packet.decode()
        if packet.is_discard:
            del self.heard[before:]
        for damaged in (packet, *frames):
            if damaged.is_corrupt and not (damaged is packet and packet.is_discard):
                raise self._damaged(damaged)
        if self.codec == "mjpeg" and not packet.is_discard:
            for frame in frames:
                with errors_named(str(self.path)):
                    if not mjpeg.is_alike(bytes(packet), frame):
                        raise self._damaged(frame)
        yield from frames

    def _damaged(self, item: Any) -> DataError:
        """The error of a packet or a frame."""
        second = float((item.pts or item.dts or 0) * self.stream.time_base)
        return DataError(f"{self.path}: is damaged near second {second:.1f}; {REMEDY}")

    def complaint(self) -> str:
        """FFmpeg's first message of an error or of damage, unless it is about another stream."""
        others = {
            stream.codec_context.name
            for stream in self.container.streams
            if stream is not self.stream and stream.codec_context is not None
        }
        return next(
            (
                f"{name}: {text.strip()}"
                for level, name, text in self.heard
                if (level <= ERROR or OF_DAMAGE.match(text)) and name not in others
            ),
            "",
        )


@contextmanager
def _opened(path: Path, **options: str) -> Iterator[_Clip]:
    """A video file and its first video stream. FFmpeg's errors, logged ones too, become ``DataError``."""
    import av

    address = str(path.absolute())  # of "a:b.mp4", FFmpeg would take "a" for a protocol
    try:
        with _listening() as heard, av.open(address, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream in it; take it out of the folder")
            clip = _Clip(path, container, container.streams.video[0], heard)
            if clip.stream.codec_context is None:
                raise DataError(f"{path}: its codec is unknown or damaged; {REMEDY}")
            clip.stream.codec_context.thread_count = 1  # callers decode several videos side by side
            yield clip
            complaint = clip.complaint()
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); {REMEDY}") from error
    if complaint:
        raise DataError(f"{path}: is damaged ({complaint}); {REMEDY}")


def _packets_behind_edit_lists(path: Path) -> int:
    with _opened(path, ignore_editlist="1") as clip:
        return sum(1 for packet in clip.container.demux(clip.stream) if packet.size)


_lock = threading.Lock()
_listeners = 0
_before: tuple[Any, bool] = (None, True)  # log level and skipping of repeats, before the first listener


@contextmanager
def _listening() -> Iterator[list[tuple[int, str, str]]]:
    """FFmpeg's errors and warnings in this thread; for much damage they are the only sign.

    PyAV's log level holds for the whole process, and by default a message that repeats the last one is dropped.
    """
    from av import logging

    global _listeners, _before
    with _lock:
        _listeners += 1
        if _listeners == 1:
            _before = logging.get_level(), logging.get_skip_repeated()
            logging.set_skip_repeated(False)
            logging.set_level(max(_before[0] or 0, WARNING))
    try:
        with logging.Capture() as heard:
            yield heard
    finally:
        with _lock:
            _listeners -= 1
            if not _listeners:
                logging.set_level(_before[0])
                logging.set_skip_repeated(_before[1])
