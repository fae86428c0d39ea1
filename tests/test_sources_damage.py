"""Damaged videos are refused by name, sound ones are read as ffmpeg reads them, and --skip-damaged goes on."""

from __future__ import annotations

import io
import os
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from featcache.errors import DataError
from featcache.sources import mjpeg, open_source
from featcache.sources.damaged import SoundVideos
from featcache.sources.video_file import count_frames, read_frames
from slotlab.pictures.frames import read_path
from tests.media import (
    CONTAINER_AND_CODEC,
    copied,
    ffmpeg_frames,
    needs_ffmpeg,
    oblong,
    save_clip,
    save_images,
    save_movie,
)

LENGTH = 18


def _moving(frames: int = LENGTH) -> np.ndarray:
    return np.stack([np.roll(oblong(1)[0], 3 * t, axis=1) for t in range(frames)])


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="priorities by process are Linux'")
@pytest.mark.parametrize(("container", "codec"), CONTAINER_AND_CODEC)
def test_writing_a_clip_leaves_the_priority_as_it_was(tmp_path: Path, container: str, codec: str) -> None:
    """Else the tests after it, and the programs that they start, hold up every other one."""
    save_clip(tmp_path, container, codec, _moving(3))
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@needs_ffmpeg
@pytest.mark.parametrize(("container", "codec"), CONTAINER_AND_CODEC)
def test_cut_anywhere_it_is_refused(tmp_path: Path, container: str, codec: str) -> None:
    clip = save_clip(tmp_path, container, codec, _moving())
    whole, frames = clip.read_bytes(), read_frames(clip)
    np.testing.assert_array_equal(frames, ffmpeg_frames(clip, 48, 64))
    assert count_frames(clip) == LENGTH
    for percent in (3, 20, 45, 60, 75, 88, 96):
        clip.write_bytes(whole[: len(whole) * percent // 100])
        for read in (read_frames, read_path):
            try:
                left = read(clip)
            except DataError as error:
                assert clip.name in str(error)
            else:  # the end of an index may go missing, and every frame be there
                assert percent > 90
                np.testing.assert_array_equal(left, frames)


@needs_ffmpeg
@pytest.mark.parametrize(("container", "codec"), CONTAINER_AND_CODEC)
def test_rotten_frames_are_refused_or_read_as_ffmpeg_reads_them(tmp_path: Path, container: str, codec: str) -> None:
    clip = save_clip(tmp_path, container, codec, _moving())
    with av.open(str(clip)) as opened:
        where = [(packet.size, packet.pos) for packet in opened.demux() if packet.size]
    data = bytearray(clip.read_bytes())
    size, at = max(where[1:])  # the first holds the encoder's own words, too
    data[at + size // 4 : at + size] = bytes(size - size // 4)
    clip.write_bytes(data)
    try:
        frames = read_frames(clip)
    except DataError as error:
        assert clip.name in str(error)
    else:
        assert codec in ("hevc", "vp9", "av1")  # whose decoders take any bytes for a picture
        np.testing.assert_array_equal(frames, ffmpeg_frames(clip, 48, 64))


def test_the_same_damage_is_seen_twice(tmp_path: Path) -> None:
    """FFmpeg's messages are passed on but once if they are equal."""
    clip = save_clip(tmp_path, "mkv", "h264", _moving())
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        (tmp_path / name).write_bytes(clip.read_bytes()[:-200])
        with pytest.raises(DataError, match=name):
            read_frames(tmp_path / name)


def test_a_header_that_promises_more_is_not_believed(tmp_path: Path) -> None:
    """An avi cut at a chunk, its sizes mended, as some programs leave them: nothing but the count is wrong."""
    whole = save_clip(tmp_path, "avi", "mjpeg", _moving()).read_bytes()
    short = bytearray(save_clip(tmp_path, "avi", "mjpeg", _moving(9)).read_bytes())
    for name, skipped in ((b"avih", 24), (b"strh", 40)):  # total frames, length of the stream
        at = short.index(name) + skipped
        short[at : at + 4] = whole[whole.index(name) + skipped :][:4]
    (tmp_path / "mended.avi").write_bytes(short)
    with pytest.raises(DataError, match=r"mended.avi: holds 9 of the 18 frames that it promises"):
        count_frames(tmp_path / "mended.avi")


@needs_ffmpeg
def test_an_avi_that_repeats_frames_is_sound(tmp_path: Path) -> None:
    """ffmpeg itself copies to twice the frame rate, each other packet empty."""
    clip, avi = save_clip(tmp_path, "mp4", "h264", _moving()), tmp_path / "copy.avi"
    subprocess.run(["ffmpeg", "-v", "error", "-i", clip, "-c", "copy", avi], check=True)
    with av.open(str(avi)) as opened:
        assert opened.streams.video[0].frames == 2 * LENGTH
    np.testing.assert_array_equal(read_frames(avi), read_frames(clip))
    np.testing.assert_array_equal(read_frames(avi), ffmpeg_frames(avi, 48, 64))
    whole = avi.read_bytes()
    for percent in (30, 60, 90):
        avi.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(DataError, match="copy.avi"):
            read_frames(avi)


@needs_ffmpeg
def test_a_file_of_one_frame_is_sound(tmp_path: Path) -> None:
    """Matroska may say how long the frame is shown by the length of the file alone."""
    clip = save_movie(tmp_path / "a.mp4", "libvpx-vp9", _moving(1), deadline="realtime")
    for suffix in ("mkv", "webm"):
        assert len(read_frames(copied(clip, tmp_path / f"a.{suffix}"))) == 1


def test_a_duration_that_promises_more_is_not_believed(tmp_path: Path) -> None:
    data = bytearray(save_clip(tmp_path, "mkv", "vp9", _moving()).read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # Duration, a float64
    data[at : at + 8] = struct.pack(">d", 2 * struct.unpack(">d", data[at : at + 8])[0])
    (tmp_path / "long.mkv").write_bytes(data)
    with pytest.raises(DataError, match=r"long.mkv: ends after 1.5 of the 3.0 seconds that it promises"):
        count_frames(tmp_path / "long.mkv")


@needs_ffmpeg
@pytest.mark.parametrize("shown", [(0, 9), (9, 9), (5, 6), (14, 4)])
def test_what_an_edit_list_hides_is_no_damage(tmp_path: Path, shown: tuple[int, int]) -> None:
    clip = save_clip(tmp_path, "mp4", "h264", _moving())
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 12  # duration in milliseconds, start in the stream's ticks, of which a frame has 1024
    start = struct.unpack(">i", data[at + 4 : at + 8])[0]
    data[at : at + 8] = struct.pack(">Ii", shown[1] * 1000 // 12, start + shown[0] * 1024)
    clip.write_bytes(data)
    np.testing.assert_array_equal(read_frames(clip), ffmpeg_frames(clip, 48, 64))
    assert len(read_frames(clip)) == shown[1]


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_may_outlast_the_picture(tmp_path: Path, suffix: str) -> None:
    clip = save_clip(tmp_path, "mp4", "h264", _moving())
    both = tmp_path / f"both.{suffix}"
    sound = ["-f", "lavfi", "-i", "sine=duration=6"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", clip, *sound, "-c:v", "copy", both], check=True)
    np.testing.assert_array_equal(read_frames(both), read_frames(clip))


def test_sound_videos_alone(tmp_path: Path) -> None:
    good = save_movie(tmp_path / "b.mp4", "libx264", _moving())
    (tmp_path / "a.mp4").write_bytes(good.read_bytes()[:-300])
    (tmp_path / "d.mp4").write_bytes(b"no video")
    save_images(tmp_path / "c", oblong(2))
    (tmp_path / "c" / "1.png").write_bytes((tmp_path / "c" / "1.png").read_bytes()[:-100])
    save_images(tmp_path, oblong(1), ["e.png"])
    source = SoundVideos(open_source(tmp_path))
    assert list(source.lengths("train")) == [LENGTH, 1]
    assert [source.read("train", i).id for i in range(2)] == ["b.mp4", "e.png"]
    assert list(source.damaged("train")) == ["a.mp4", "c", "d.mp4"]
    assert [Path(why.split(": ")[0]).name for why in source.damaged("train").values()] == ["a.mp4", "1.png", "d.mp4"]
    for path in (good, tmp_path / "e.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"every video of train is damaged; the first: .*a.mp4"):
        SoundVideos(open_source(tmp_path)).lengths("train")


@pytest.mark.parametrize("damage", ["cut out", "cut off", "zeroed"])
def test_a_gif_whose_blocks_do_not_join_is_refused(tmp_path: Path, damage: str) -> None:
    """FFmpeg plays such a file up to the damage, without a word."""
    first, *rest = map(Image.fromarray, _moving(4))
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=rest)
    sound = path.read_bytes()
    assert open_source(tmp_path).lengths("train") == (4,)
    middle = len(sound) // 2
    path.write_bytes(
        {
            "cut out": sound[:middle] + sound[middle + 64 :],
            "cut off": sound[:middle],
            "zeroed": sound[:middle] + bytes(400) + sound[middle + 400 :],
        }[damage]
    )
    with pytest.raises(DataError, match=r"a.gif: is damaged"):
        open_source(tmp_path).read("train", 0)


@needs_ffmpeg
@pytest.mark.parametrize("loop", [{}, {"loop": 0, "duration": [40, 80, 120, 40], "comment": b"of noise"}])
def test_a_gif_of_noise_is_read_whole(tmp_path: Path, loop: dict[str, object]) -> None:
    """FFmpeg 8 takes its pictures for one."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8)
    first, *rest = map(Image.fromarray, noise)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, **loop)
    with Image.open(tmp_path / "a.gif") as image:
        theirs = np.stack([np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(image)])
    source = open_source(tmp_path)
    assert source.lengths("train") == (4,) and source.size("train", 0) == (48, 64)
    np.testing.assert_array_equal(source.read("train", 0).frames, theirs)
    np.testing.assert_array_equal(theirs, ffmpeg_frames(tmp_path / "a.gif", 48, 64))


# -- Motion JPEG -------------------------------------------------------------------------------------------


def _flipped(packet: bytes, rng: np.random.Generator) -> bytes:
    """A JPEG with a few flipped bits in its codes, none of which becomes or was a marker."""
    data = bytearray(packet)
    begin = data.index(b"\xff\xda") + 14
    for at in rng.integers(begin, len(data) - 2, 3).tolist():
        changed = data[at] ^ (1 << int(rng.integers(8)))
        if 0xFF not in (data[at], changed, data[at - 1]):
            data[at] = changed
    return bytes(data)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("container", ["mov", "avi", "mkv"])
def test_a_damaged_jpeg_is_refused_or_read_as_libjpeg_reads_it(tmp_path: Path, container: str) -> None:
    """FFmpeg says nothing of much of this damage; what it shows then is its own guess."""
    clip = save_clip(tmp_path, container, "mjpeg", _moving())
    whole = clip.read_bytes()
    with av.open(str(clip)) as opened:
        packets = [bytes(packet) for packet in opened.demux() if packet.size]
    rng, refused, read = np.random.default_rng(0), 0, 0
    for _ in range(40):
        index = int(rng.integers(len(packets)))
        packet = _flipped(packets[index], rng)
        clip.write_bytes(whole.replace(packets[index], packet))
        try:
            frame = read_frames(clip)[index]
        except DataError as error:
            refused += clip.name in str(error)
            continue
        theirs = np.asarray(Image.open(io.BytesIO(packet)).convert("RGB"), float)
        assert np.abs(theirs - frame).mean() < 3
        read += 1
    assert refused > 10 and read + refused == 40


@pytest.mark.parametrize("pixels", ["yuvj420p", "yuvj422p", "yuvj444p"])
@pytest.mark.parametrize("quality", ["2", "8", "31"])
def test_sound_jpegs_are_alike_in_two_decoders(tmp_path: Path, pixels: str, quality: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
    other = _moving(1)[0]
    for k, frames in enumerate((noise, _moving(2))):
        options = {"qmin": quality, "qmax": quality, "strict": "unofficial"}
        save_movie(tmp_path / f"{k}.avi", "mjpeg", frames, pixels, **options)
        assert len(read_frames(tmp_path / f"{k}.avi")) == 2
        with av.open(str(tmp_path / f"{k}.avi")) as opened:
            packet = next(packet for packet in opened.demux() if packet.size)
            (frame,) = packet.decode()
        assert mjpeg.is_alike(bytes(packet), frame) and mjpeg.is_alike(bytes(packet)[:-2], frame), "without its end"
        with io.BytesIO() as file:
            Image.fromarray(other).resize((frame.width, frame.height)).save(file, "JPEG")
            assert not mjpeg.is_alike(file.getvalue(), frame)


# -- tables of mp4 and mov ---------------------------------------------------------------------------------


@needs_ffmpeg
@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("table", ["stts", "stss", "stsc", "stsz", "stco", "ctts"])
def test_a_table_that_promises_more_than_it_holds_is_damage(tmp_path: Path, container: str, table: str) -> None:
    clip = save_clip(tmp_path, container, "h264", _moving())
    whole = clip.read_bytes()
    at = whole.index(table.encode()) + 4 + (8 if table == "stsz" else 4)
    data = bytearray(whole)
    data[at] ^= 0x01  # 2 ** 24 entries more
    clip.write_bytes(data)
    complains = subprocess.run(
        ["ffmpeg", "-v", "warning", "-nostdin", "-i", clip, "-f", "null", "-"], capture_output=True, check=False
    )
    assert complains.stderr, "ffmpeg tells, too"
    with pytest.raises(DataError, match=rf"{container}: (is damaged|cannot be decoded)"):
        read_frames(clip)
    clip.write_bytes(whole)
    assert len(read_frames(clip)) == LENGTH


@needs_ffmpeg
@pytest.mark.parametrize("frame", [0, 7])
def test_a_frame_that_a_table_puts_far_away_is_damage(tmp_path: Path, frame: int) -> None:
    """FFmpeg takes the first for the start, or takes others for hidden ones, and shows what is left."""
    clip = save_clip(tmp_path, "mov", "hevc", _moving())
    whole = clip.read_bytes()
    at = whole.index(b"ctts") + 4 + 8 + 8 * frame + 4  # an entry: a count, an offset
    data = bytearray(whole)
    data[at] ^= 0x2A
    clip.write_bytes(data)
    with pytest.raises(AssertionError, match="dts to muxer"):  # ffmpeg tells, too
        ffmpeg_frames(clip, 48, 64)
    with pytest.raises(DataError, match=r"hevc.mov: is damaged \(a frame is shown \d+ seconds off its place\)"):
        read_frames(clip)


def test_a_track_without_a_unit_of_time_is_damage(tmp_path: Path) -> None:
    """FFmpeg hides all of its frames but one, and the errors of hidden ones do not count."""
    clip = save_clip(tmp_path, "mp4", "h264", _moving())
    data = bytearray(clip.read_bytes())
    at = data.index(b"mdhd") + 4 + 4 + 8  # past its version and two times
    data[at : at + 8] = bytes(8)  # units a second, and the length
    clip.write_bytes(data)
    with pytest.raises(DataError, match=r"h264.mp4: "):
        read_frames(clip)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_zeros_within_a_frame_are_damage(tmp_path: Path, codec: str, suffix: str) -> None:
    """H.264 (7.4.1) and HEVC (7.4.2) write no three zero bytes but before a start code; FFmpeg 8 reads over some."""
    more = {"x265-params": "log-level=none:keyint=6"} if codec == "libx265" else {"g": "6"}
    clip = save_movie(tmp_path / f"a.{suffix}", codec, np.tile(_moving(), (1, 4, 4, 1)), **more)
    assert len(read_frames(clip)) == LENGTH
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as opened:
        packets = [bytes(packet) for packet in opened.demux() if packet.size]
    tail = max(packets, key=len)[-64:]  # of one of the stream's own packets of 188 bytes, or of a block
    at = data.index(tail)
    data[at + 20 : at + 42] = bytes(22)
    clip.write_bytes(data)
    with pytest.raises(DataError, match=rf"a.{suffix}: is damaged"):
        read_frames(clip)
