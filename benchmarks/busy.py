"""Whole commands on a quiet machine and beside a training that spins: how much longer they take.

    python -m benchmarks.busy [--cache cache/dinov2.zarr] [--run demo/seed0-steps400] [--rounds 3] [--json]
        [--jobs eval report train extract] [--quiet slotlab 300000] [--busy slotlab]

Every figure is the time of a process from its start to its end, with as many threads as it takes by itself. ``eval``
and ``report`` read a copy of the run; ``train`` takes 100 steps; ``extract`` makes a store of 4 videos. The neighbour
is ``slotlab train`` with default threads that spin at every barrier, as those of any program do that leaves OpenMP as
it comes (GNU's libgomp: 3 ms and more). Threads of what is measured wait in one of these ways:

- ``slotlab``: as slotlab sets it;
- ``passive``: ``OMP_WAIT_POLICY=PASSIVE``, asleep at once;
- a number: ``GOMP_SPINCOUNT`` of that many rounds, and then asleep (libgomp's own where nothing is set: 300000);
- ``active``: ``OMP_WAIT_POLICY=ACTIVE``, spinning.

``--quiet`` and ``--busy`` name those to measure without and with the neighbour. They alternate, and the neighbour comes
and goes in every round. "Quiet" is only what this program leaves so: nothing else may run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from benchmarks.harness import alternate, paired_ratio, report
from featcache.machine import machine

LIBGOMP = "300000"  # rounds of libgomp where nothing is set
POLICIES = {
    "slotlab": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}


def wait(text: str) -> str:
    """An argument that names a policy: one of ``POLICIES`` or a count of rounds."""
    if text in POLICIES or text.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rounds nor one of {', '.join(POLICIES)}")


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, args)]


def environment(policy: str) -> dict[str, str]:
    """One policy, and no other setting of threads."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    return kept | POLICIES.get(policy, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": policy})


class Neighbour:
    """A training beside whatever is measured, once it takes steps."""

    def __init__(self, cache: Path, folder: Path) -> None:
        self._command = command("train", "--cache", cache, "--steps", 10**6, "--out", folder)
        self._folder, self._log = folder, folder.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._log.open("w") as log:  # a pipe that nobody reads would stop it
            self._process = subprocess.Popen(self._command, env=environment(LIBGOMP), stdout=log, stderr=log)
        while not (self._folder / "metrics.jsonl").exists():
            if self._process.poll() is not None:
                raise SystemExit(f"the training beside has ended: {self._log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def seconds(name: str, asked: Sequence[object], makes: Path, policy: str, neighbour: Neighbour, busy: bool) -> float:
    """Time of one process; what it makes is deleted before."""
    neighbour.start() if busy else neighbour.stop()
    shutil.rmtree(makes, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(command(*asked), env=environment(policy), capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"slotlab {' '.join(map(str, asked))}: {done.stderr}")
    print(f"{name}: {took:.1f} s", file=sys.stderr)
    return took


def table(machine: str, figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Medians of the seconds in Markdown, and the ratios to the first column."""
    columns = list(next(iter(figures.values())))
    lines = [["command", *columns], ["---"] * (1 + len(columns))]
    for job, found in figures.items():
        lines.append([job, *(f"{value['seconds']:.1f} s ({value['ratio']:.2f})" for value in found.values())])
    title = f"Seconds (and times the first column's), {machine}"
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache/dinov2.zarr"))
    parser.add_argument("--run", type=Path, default=Path("demo/seed0-steps400"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", default=["eval", "report", "train", "extract"])
    parser.add_argument("--quiet", nargs="+", type=wait, default=["slotlab", LIBGOMP])
    parser.add_argument("--busy", nargs="*", type=wait, default=["slotlab"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the training beside would go on

    with tempfile.TemporaryDirectory() as place, Neighbour(args.cache, Path(place, "neighbour")) as neighbour:
        run, made = Path(place, "run"), Path(place, "made")
        shutil.copytree(args.run, run)
        commands = {
            "eval": ("eval", run, "--cache", args.cache, "--json"),
            "report": ("report", run, "--cache", args.cache, "--out", made / "report.html"),
            "train": ("train", "--cache", args.cache, "--steps", 100, "--out", made),
            "extract": ("extract", "--split", "validation", "--max-videos", 4, "--out", made),
        }
        jobs = {}
        for busy, policies in ((False, args.quiet), (True, args.busy)):
            for job, policy in itertools.product(args.jobs, policies):
                name = f"{job} {'beside' if busy else 'quiet'}, {policy}"
                jobs[name] = partial(seconds, name, commands[job], made, policy, neighbour, busy)
        # Leaves the scores that report reads.
        seconds("first eval", commands["eval"], made, "slotlab", neighbour, False)
        times = alternate(jobs, args.rounds)

    first, *_ = columns = [f"quiet, {policy}" for policy in args.quiet] + [f"beside, {policy}" for policy in args.busy]
    figures = {
        job: {
            column: {
                "seconds": round(statistics.median(times[f"{job} {column}"]), 2),
                "ratio": round(paired_ratio(times, f"{job} {column}", f"{job} {first}"), 3),
            }
            for column in columns
        }
        for job in args.jobs
    }
    if args.json:
        report("busy", {"ratio_to": first, "commands": figures, "all": times})
    else:
        print(table(machine(), figures))


if __name__ == "__main__":
    main()
