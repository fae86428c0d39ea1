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
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.readable import KINDS, LIMIT, Arrays, Kind, same
from featcache.errors import FeatcacheError
from featcache.sources import open_source

MEMORY = 8 << 30  # bytes of address space of the process that reads
OUTCOMES = ("refused", "sound", "as others", "OTHER", "TRACEBACK", "HANG")
BAD = OUTCOMES[3:]


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
