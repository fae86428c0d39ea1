"""Small damages to files of every kind that is read: refused by name, or read as others read them.

    python -m benchmarks.corruptions [--cases 500] [--seed 0] [--kind mp4/h264] [--json]
    python -m benchmarks.corruptions --look 123 --keep FOLDER      one case again, and its file

A case takes a sound file and flips, cuts off, cuts out, zeroes or swaps a few of its bytes. Then it is read as
extraction reads it. What may come of it:

refused    one line that names the file
sound      the values of the undamaged file: the damage lies where nothing is read
as others  other values, but those that the ffmpeg program, Pillow or h5py read without a complaint
OTHER      other values, or a complaint of theirs and none here
TRACEBACK  an error that is no line for a user, or the end of the process
HANG       no end within the limit

Cases run in one process beside this one, which ends it when a case takes too long. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from featcache.errors import FeatcacheError
from featcache.sources import open_source
from tests.media import CONTAINER_AND_CODEC, oblong, save_clip
from tests.movi_files import write_movi

LIMIT = 20.0  # seconds of a case
MEMORY = 8 << 30  # bytes of address space of the process that reads
FRAMES = 12
OUTCOMES = ("refused", "sound", "as others", "OTHER", "TRACEBACK", "HANG")
BAD = OUTCOMES[3:]

Arrays = list[npt.NDArray[Any]]  # of each video in turn: frames, and masks where it has some
Others = Callable[[Path, Arrays], Arrays | None]  # what others read; None where they complain


# -- sound files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    name: str
    make: Callable[[Path], tuple[Path, Path]]  # in an empty folder: what is opened, and the file to damage
    others: Others


def moving() -> npt.NDArray[np.uint8]:
    return np.stack([np.roll(oblong(1)[0], 3 * t, axis=1) for t in range(FRAMES)])


def numbers() -> npt.NDArray[np.uint8]:
    """Masks (T, H, W)."""
    return (moving()[..., 0] // 50).astype(np.uint8)


def clip(container: str, codec: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        path = save_clip(folder, container, codec, moving())
        return path, path

    return make


def image(name: str, mode: str = "RGB", pages: int = 1, **how: Any) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        frames = moving()[:pages]
        if mode == "I;16":
            first, *more = (Image.fromarray(frame[..., 0].astype(np.uint16) * 257) for frame in frames)
        else:
            first, *more = (Image.fromarray(frame).convert(mode) for frame in frames)
        first.save(folder / name, **({"save_all": True, "append_images": more} if more else {}), **how)
        return folder / name, folder / name

    return make


def masked(name: str, mode: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        for place, frame, mask in zip(range(2), moving(), numbers(), strict=False):
            for path, values in ((folder / "walk", frame), (folder / "masks" / "walk", mask)):
                path.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(values)
                if values.ndim == 2 and mode == "P":
                    picture.putpalette(list(range(255)) * 3)
                elif values.ndim == 2:
                    picture = Image.fromarray(values > 2) if mode == "1" else picture
                picture.save(path / (f"{place}.png" if values.ndim == 3 else f"{place}{name}"))
        return folder, folder / "masks" / "walk" / f"0{name}"

    return make


def hdf5(**how: Any) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("video", data=moving()[None], **how)
            file.create_dataset("mask", data=numbers()[None], **how)
        return folder / "a.h5", folder / "a.h5"

    return make


def tfrecord(folder: Path) -> tuple[Path, Path]:
    movi = write_movi(folder / "movi", {"train": 2})
    return movi, next(movi.glob("*.tfrecord-*"))


# -- what others read --------------------------------------------------------------------------------------


def by_ffmpeg(path: Path, ours: Arrays) -> Arrays | None:
    height, width = ours[0].shape[1:3]
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(path), "-map", "0:v:0"]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-sws_flags", "bicubic", "-"]
    read = subprocess.run(command, capture_output=True, check=False, timeout=LIMIT)
    # What the writer of raw pictures says of their times is no complaint about the pictures.
    complaints = [line for line in read.stderr.splitlines() if line and not line.startswith(b"[rawvideo @")]
    if read.returncode or complaints or len(read.stdout) % (height * width * 3):
        return None
    return [np.frombuffer(read.stdout, np.uint8).reshape(-1, height, width, 3)]


def by_ffmpeg_or_libjpeg(path: Path, ours: Arrays) -> Arrays | None:
    """FFmpeg's versions differ in what they notice: libjpeg may agree with the one at hand.

    Brightness is compared at full size, colours at half of it, where libjpeg has them as the file does (4:2:0)."""
    import av

    theirs = by_ffmpeg(path, ours)
    if theirs is not None and same(ours, theirs):
        return theirs
    try:
        with av.open(str(path)) as opened:
            packets = [packet for packet in opened.demux(opened.streams.video[0]) if packet.size]
            shown = [(bytes(packet), frame) for packet in packets for frame in packet.decode()]
        alike = [
            np.abs(channel.astype(int) - np.asarray(plane)).max() <= 8
            for data, frame in shown
            for channel, plane in zip(_planes_by_libjpeg(data), _planes(frame), strict=True)
        ]
        read = np.stack([frame.to_ndarray(format="rgb24") for _, frame in shown])
        return ours if all(alike) and same(ours, [read]) else theirs
    except Exception:
        return theirs


def _planes_by_libjpeg(data: bytes) -> list[npt.NDArray[np.uint8]]:
    channels = []
    for shrink in (1, 2):
        image = Image.open(io.BytesIO(data))
        image.draft("YCbCr", (image.width // shrink, image.height // shrink))
        channels.append(np.asarray(image))
    return [channels[0][..., 0], channels[1][..., 1], channels[1][..., 2]]


def _planes(frame: Any) -> list[npt.NDArray[np.uint8]]:
    return [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in frame.planes]


def by_pillow(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with Image.open(path) as opened:
            frames = []
            for page in ImageSequence.Iterator(opened):
                grey = page.mode.startswith("I")
                shown = Image.fromarray((np.asarray(page) >> 8).astype(np.uint8)) if grey else page
                frames.append(np.asarray(shown.convert("RGB")))
        return [np.stack(frames)]
    except Exception:
        return None


def mask_by_pillow(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with Image.open(path) as opened:
            mask = np.asarray(opened)
        return [ours[0], np.stack([mask.astype(np.uint8), ours[1][1]])]
    except Exception:
        return None


def by_h5py(path: Path, ours: Arrays) -> Arrays | None:
    try:
        with h5py.File(path) as file:
            return [file["video"][0], *([file["mask"][0]] if "mask" in file else [])]
    except Exception:
        return None


def by_nobody(path: Path, ours: Arrays) -> Arrays | None:
    return None


KINDS: tuple[Kind, ...] = (
    *(
        Kind(f"{container}/{codec}", clip(container, codec), by_ffmpeg_or_libjpeg if codec == "mjpeg" else by_ffmpeg)
        for container, codec in CONTAINER_AND_CODEC
    ),
    Kind("gif", image("a.gif", "P", 4), by_ffmpeg),
    Kind("png", image("a.png"), by_pillow),
    Kind("png, palette", image("a.png", "P"), by_pillow),
    Kind("png, 16 bits", image("a.png", "I;16"), by_pillow),
    Kind("apng", image("a.apng", pages=4, format="PNG"), by_pillow),
    Kind("jpeg", image("a.jpg"), by_pillow),
    Kind("jpeg, progressive", image("a.jpg", progressive=True), by_pillow),
    Kind("tiff, raw, pages", image("a.tif", pages=4), by_pillow),
    Kind("tiff, deflate, pages", image("a.tif", pages=4, compression="tiff_adobe_deflate"), by_pillow),
    Kind("tiff, lzw", image("a.tif", compression="tiff_lzw"), by_pillow),
    Kind("webp", image("a.webp"), by_pillow),
    Kind("webp, lossless, animated", image("a.webp", pages=4, lossless=True), by_pillow),
    Kind("bmp", image("a.bmp"), by_pillow),
    Kind("ppm", image("a.ppm"), by_pillow),
    Kind("mask, png", masked(".png", "L"), mask_by_pillow),
    Kind("mask, png palette", masked(".png", "P"), mask_by_pillow),
    Kind("mask, png 1 bit", masked(".png", "1"), mask_by_pillow),
    Kind("mask, tiff", masked(".tif", "L"), mask_by_pillow),
    Kind("mask, bmp", masked(".bmp", "L"), mask_by_pillow),
    Kind("hdf5", hdf5(), by_h5py),
    Kind("hdf5, gzip", hdf5(compression="gzip", chunks=True), by_h5py),
    Kind("hdf5, gzip, checksums", hdf5(compression="gzip", chunks=True, fletcher32=True), by_h5py),
    Kind("tfrecord", tfrecord, by_nobody),
)


# -- damage ------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """The data with a small damage, and what was done."""
    how = ("flipped", "cut off", "cut out", "zeroed", "swapped")[rng.integers(5)]
    changed = bytearray(data)
    at = int(rng.integers(len(data)))
    size = int(rng.integers(1, 65))
    if how == "flipped":
        places = rng.integers(len(data), size=rng.integers(1, 9))
        for place in places.tolist():
            changed[place] ^= int(rng.integers(1, 256))
        return bytes(changed), f"flipped {sorted(places.tolist())}"
    if how == "cut off":
        del changed[max(1, at) :]
    elif how == "cut out":
        del changed[at : at + size]
    elif how == "zeroed":
        changed[at : at + 4 * size] = bytes(len(changed[at : at + 4 * size]))
    else:
        to = int(rng.integers(len(data)))
        size = min(size, abs(to - at), len(data) - max(at, to))
        changed[at : at + size], changed[to : to + size] = data[to : to + size], data[at : at + size]
        return bytes(changed), f"swapped {size} at {at} and {to}"
    return bytes(changed), f"{how} {size if how != 'cut off' else ''} at {at} of {len(data)}"


# -- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    case: int
    kind: str
    damage: str
    outcome: str
    said: str = ""


def read(location: Path) -> Arrays:
    """All that extraction would take. ``ValueError`` where the source has promised it something else."""
    source = open_source(location)
    arrays: Arrays = []
    for split in source.splits():
        lengths = source.lengths(split)
        for index in range(source.videos(split)):
            size, video = source.size(split, index), source.read(split, index)
            if len(video.frames) != lengths[index] or size not in (None, video.frames.shape[1:3]):
                raise ValueError(f"{lengths[index]} frames of {size} promised, {video.frames.shape} read")
            arrays.append(video.frames)
            if video.segmentations is not None:
                arrays.append(video.segmentations)
    return arrays


def same(some: Arrays, others: Arrays) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


class Reader:
    """Sound files of each kind, made once, and what is read of them."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[Kind]) -> None:
        self._folder, self._seed, self._kinds = folder, seed, kinds
        self._sound: dict[str, tuple[Path, Path, bytes, Arrays]] = {}

    def case(self, number: int) -> Result:
        kind = self._kinds[number % len(self._kinds)]
        if kind.name not in self._sound:
            folder = self._folder / str(len(self._sound))
            folder.mkdir()
            location, file = kind.make(folder)
            self._sound[kind.name] = location, file, file.read_bytes(), read(location)
        location, file, data, sound = self._sound[kind.name]
        changed, damage = damaged(data, np.random.default_rng((self._seed, number)))
        file.write_bytes(changed)
        outcome, said = self._outcome(kind, location, file, sound)
        return Result(number, kind.name, damage, outcome, said)

    def _outcome(self, kind: Kind, location: Path, file: Path, sound: Arrays) -> tuple[str, str]:
        try:
            ours = read(location)
        except FeatcacheError as error:
            line = str(error)
            named = str(location) in line and "\n" not in line
            return ("refused", line) if named else ("TRACEBACK", f"names no file: {line}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "TRACEBACK", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        if same(ours, sound):
            return "sound", ""
        theirs = kind.others(file, ours)
        if theirs is None:
            return "OTHER", "others complain"
        if same(ours, theirs):
            return "as others", ""
        return "OTHER", f"{[a.shape for a in ours]} here, {[a.shape for a in theirs]} by others"


def work(link: Connection, folder: Path, seed: int, kinds: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    reader = Reader(folder, seed, [kind for kind in KINDS if kind.name in kinds])
    with suppress(EOFError):
        while True:
            link.send(reader.case(link.recv()))


def run(
    numbers: Sequence[int], seed: int = 0, kinds: Sequence[str] = (), limit: float = LIMIT, start: float = 60
) -> Iterator[Result]:
    """The results of some cases, each within a limit of seconds, the first of a process within ``start``."""
    names = [kind.name for kind in KINDS if not kinds or kind.name in kinds]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        process, link = None, None
        for turn, number in enumerate(numbers):
            if process is None or link is None:
                link, there = context.Pipe()
                own = Path(folder) / str(turn)
                own.mkdir()
                process = context.Process(target=work, args=(there, own, seed, names), daemon=True)
                process.start()
                there.close()
                patience = max(start, limit)  # it imports, and makes the file
            link.send(number)
            try:
                if not link.poll(patience):
                    raise TimeoutError
                yield link.recv()
            except (EOFError, OSError) as error:
                hangs = isinstance(error, TimeoutError)
                process.kill()
                process.join()
                said = "" if hangs else f"ended with code {process.exitcode}"
                kind = names[number % len(names)]
                yield Result(number, kind, "", "HANG" if hangs else "TRACEBACK", said)
                process = link = None
            patience = limit
        if process is not None and link is not None:
            link.close()
            process.join()


def table(results: Sequence[Result]) -> str:
    """Counts by kind."""
    counts = {kind.name: Counter[str]() for kind in KINDS}
    for result in results:
        counts[result.kind][result.outcome] += 1
    rows = [(name, of) for name, of in counts.items() if of] + [("all", sum(counts.values(), Counter()))]
    text = io.StringIO()
    print(f"{'':26}", *(f"{outcome:>9}" for outcome in OUTCOMES), file=text)
    for name, of in rows:
        print(f"{name:26}", *(f"{of[outcome] or '–':>9}" for outcome in OUTCOMES), file=text)
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="kind to damage, alone; repeatable")
    parser.add_argument("--look", type=int, help="one case alone, in this process")
    parser.add_argument("--keep", type=Path, help="folder for the file of --look")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.look is not None:
        folder = args.keep or Path(tempfile.mkdtemp())
        folder.mkdir(exist_ok=True)
        kinds = [kind for kind in KINDS if not args.kind or kind.name in args.kind]
        print(Reader(folder, args.seed, kinds).case(args.look), folder)
        return
    began = time.perf_counter()
    results = []
    for result in run(range(args.cases), args.seed, args.kind or ()):
        results.append(result)
        if result.outcome in BAD:
            print(f"case {result.case}: {result}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    if args.json:
        bad = [asdict(result) for result in results if result.outcome in BAD]
        by_kind = {
            kind.name: dict(Counter(r.outcome for r in results if r.kind == kind.name))
            for kind in KINDS
            if any(r.kind == kind.name for r in results)
        }
        print(json.dumps({"benchmark": "corruptions", "cases": len(results), "seed": args.seed, "seconds": seconds,
                          "by_kind": by_kind, "bad": bad}, indent=1))  # fmt: skip
    else:
        print(table(results), end="")
        print(f"{len(results)} cases of seed {args.seed} in {seconds:.0f} s")
    if any(result.outcome in BAD for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
