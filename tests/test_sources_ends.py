"""Files that do not say how long they are: cut within a packet, a page or a frame they are refused; between two, a
stream passes as a shorter one, with the frames that it would have shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featcache.errors import DataError
from featcache.sources.video_file import read_frames
from slotlab.pictures.frames import read_path
from tests.media import ffmpeg_frames, needs_ffmpeg, oblong, save_movie

LENGTH = 12
# File -> encoder, its options, and the bytes of a unit between which a cut cannot be told from an end.
KINDS: dict[str, tuple[str, dict[str, str], int]] = {
    "h264.ts": ("libx264", {"g": "4", "bf": "2"}, 188),
    "mpeg2.ts": ("mpeg2video", {"g": "4"}, 188),
    "h264.m2ts": ("libx264", {"g": "4", "bf": "2"}, 192),
    "vp8.ogv": ("libvpx", {"deadline": "realtime"}, 0),
    "raw.y4m": ("rawvideo", {}, 0),
}


def _made(folder: Path, name: str) -> tuple[Path, bytes, np.ndarray]:
    """A clip, its bytes and its frames (T, H, W, 3)."""
    frames = np.stack([np.roll(oblong(1)[0], 3 * t, axis=1) for t in range(LENGTH)])
    clip = save_movie(folder / name, KINDS[name][0], frames, **KINDS[name][1])
    return clip, clip.read_bytes(), ffmpeg_frames(clip, 48, 64)


@needs_ffmpeg
@pytest.mark.parametrize("name", KINDS)
def test_cut_within_a_unit_it_is_refused(tmp_path: Path, name: str) -> None:
    clip, whole, frames = _made(tmp_path, name)
    np.testing.assert_array_equal(read_frames(clip), frames)
    rng, unit = np.random.default_rng(0), KINDS[name][2]
    for at in rng.integers(len(whole) // 5, len(whole), 20).tolist():
        clip.write_bytes(whole[: at + (unit > 0 and at % unit == 0)])
        for read in (read_frames, read_path):
            with pytest.raises(DataError, match=clip.name):
                read(clip)


@needs_ffmpeg
@pytest.mark.parametrize("name", [name for name, (*_, unit) in KINDS.items() if unit])
def test_cut_between_packets_it_is_refused_or_a_shorter_video(tmp_path: Path, name: str) -> None:
    clip, whole, frames = _made(tmp_path, name)
    unit, shorter = KINDS[name][2], 0
    for packets in np.random.default_rng(0).integers(len(whole) // unit // 4, len(whole) // unit, 12).tolist():
        clip.write_bytes(whole[: packets * unit])
        try:
            left = read_frames(clip)
        except DataError as error:
            assert clip.name in str(error)
        else:
            assert {frame.tobytes() for frame in left} <= {frame.tobytes() for frame in frames}
            shorter += len(left) < LENGTH
    assert shorter, "which docs/data.md owns up to"


@needs_ffmpeg
def test_parity_and_what_is_joined_are_no_damage(tmp_path: Path) -> None:
    clip, whole, frames = _made(tmp_path, "mpeg2.ts")
    packets = np.frombuffer(whole, np.uint8).reshape(-1, 188)
    clip.write_bytes(np.pad(packets, ((0, 0), (0, 16))).tobytes())  # 204 bytes, as received from a satellite
    np.testing.assert_array_equal(read_frames(clip), frames)
    clip.write_bytes(whole[100:])  # a recording begins anywhere
    np.testing.assert_array_equal(read_frames(clip), ffmpeg_frames(clip, 48, 64))


@needs_ffmpeg
def test_a_stream_of_pages_that_was_never_ended_is_refused(tmp_path: Path) -> None:
    clip, whole, _ = _made(tmp_path, "vp8.ogv")
    clip.write_bytes(whole[: whole.rindex(b"OggS")])
    with pytest.raises(DataError, match=r"vp8.ogv: is damaged \(its last page is missing\)"):
        read_frames(clip)
