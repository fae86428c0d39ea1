"""What a GPU has to show, in order of value, each part under a limit of its own, all of it in ten minutes.

    python -m benchmarks.gpu [--out FOLDER] [--device cuda] [--minutes 10] [--cache STORE] [--small]

Runs from a checkout, without installing the package. Every part is a process: what the machine has, the tests on CUDA,
extraction beside the bare model, the stream from disk, host and device, and training steps of the presets over batch
sizes, with CUDA graphs and without. Beside each figure stands what ``slotlab plan`` foretold for the same work
(benchmarks.foretold). After each part ``gpu.json`` and ``gpu.md`` are written anew, so that what was measured stays
when the rest is cut off. A part that fails or takes too long is a row that says so. ``--small`` makes every part short
enough to try the whole on a CPU. Where the published weights cannot be had, the backbone's are random: rates are the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.foretold import DEVICE, EXTRACTION, RESIDENCES, Training, stream_key
from featcache.machine import machine, on_windows_drive, readable
from featcache.store.durable import write_durably

ROOT = Path(__file__).resolve().parents[1]

LEAST = 5.0  # seconds that a part is begun with
STORE = 120.0  # seconds for the store that is made
PATIENCE = 3  # times as long for a part that --small tries on a CPU
FORETOLD = "plan"  # the part that says what the others should find
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A measured value beside what was foretold of it, both in one unit; a fact of the machine is a ``note`` alone."""

    name: str
    measured: float | None = None
    foretold: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.measured / self.foretold if self.measured and self.foretold else None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        measured = shown(self.measured, self.unit)
        said = ", ".join(part for part in (measured if self.measured is not None else "", self.note) if part)
        return self.name, said or "–", shown(self.foretold, self.unit), shown(self.ratio, "")


def shown(value: float | None, unit: str) -> str:
    """A value in a unit: ``bytes``, ``s`` and ``share`` in those that people read."""
    if value is None:
        return "–"
    if unit.startswith("bytes"):
        return readable(value) + unit.removeprefix("bytes")
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.3g}{unit and ' ' + unit}" if value < 100 else f"{value:.0f} {unit}".rstrip()


@dataclass(frozen=True)
class Part:
    """One process: its name, its command, its limit in seconds, and the figures that its JSON gives beside what was
    foretold under its key."""

    name: str
    command: tuple[str, ...]
    limit: float
    figures: Callable[[Found, Found], Iterator[Figure]] = lambda *_: iter(())
    key: str = ""
    lacks: str = ""  # what it needs and this machine has not: it is not run


@dataclass
class Result:
    """What came of a part."""

    name: str
    command: str
    outcome: str = "not begun: the time was up"
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)  # the command's JSON
    said: str = ""  # the end of its stderr, where it failed
    figures: list[Figure] = field(default_factory=list)


def slotlab(*args: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "cli", *map(str, args))


NARROW, SHORT = "model.decoder.hidden=64", "data.clip=2"

# Preset, batch sizes, and what makes its steps short for a trial. Operations of many frames are small, so that graphs
# matter most where clips are.
LADDER: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("default", (64, 256), ()),
    ("dinosaur", (64, 256, 1024), (NARROW,)),
    ("log-2026-video", (8, 64), (SHORT,)),
    ("videosaur", (64,), (NARROW, SHORT)),
    ("slotcontrast", (64,), (NARROW, SHORT)),
    ("savi-dinosaur", (64,), (NARROW, SHORT)),
    ("dinosaur-ar", (64,), ()),
    ("mix", (64,), ()),
    ("log-2026", (32,), (NARROW,)),
)
GRAPHS = ("--set", "optim.compile=true", "--set", "optim.cuda_graphs=true")


def ladder(device: str, small: bool) -> Iterator[tuple[Training, bool]]:
    """Trainings and whether they run as CUDA graphs, the most valuable first: every preset, every preset as graphs, and
    then the larger batches."""
    precision = "float32" if device == "cpu" else "bfloat16"  # which a CPU may emulate
    if small:
        yield from ((Training(preset, 1, precision, shortened), False) for preset, _, shortened in LADDER)
        return
    for rung in range(max(len(batches) for _, batches, _ in LADDER)):
        for graphs in (False, True):
            for preset, batches, _ in LADDER:
                if rung < len(batches):
                    yield Training(preset, batches[rung], precision), graphs


def parts(device: str, cache: Path, small: bool) -> Iterator[Part]:
    """Every part that needs the store, the most valuable first."""
    if device != "cpu":
        lacks = "" if importlib.util.find_spec("pytest") else "pytest"
        command = (sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-o", "addopts=")
        yield Part("tests on CUDA", command, 150, lacks=lacks)
    trainings = dict.fromkeys(training.key for training, _ in ladder(device, small))
    command = (sys.executable, "-m", "benchmarks.foretold", "--cache", str(cache), "--device", device, *trainings)
    yield Part(FORETOLD, command, 90, plan_figures, DEVICE)

    few = ("--rounds", 1) if small else ()
    bench = slotlab("bench", "extract", "--weights", "random", "--device", device, "--json", *few)
    frames = ("--videos", "1", "--frame-stride", "6") if small else ()
    yield Part("extraction", (*bench, *frames), 90, extraction_figures, EXTRACTION)
    for residence in RESIDENCES:
        warm = () if residence == "disk" else ("--no-cold",)
        options = (
            "--residence",
            residence,
            "--device",
            device,
            "--json",
            *warm,
            *few,
            *(("--batches", 4) if small else ()),
        )
        stream = slotlab("bench", "stream", "--cache", cache, *options)
        yield Part(f"stream from {residence}", stream, 45, stream_figures, stream_key(residence))
    steps = ("--steps", 1, "--rounds", 1) if small else ("--steps", 10, "--rounds", 3)
    for training, graphs in ladder(device, small):
        sets = (*(part for setting in training.settings for part in ("--set", setting)), *(GRAPHS if graphs else ()))
        what = ("--cache", cache, "--preset", training.preset, "--batch-size", training.batch_size, *sets, *steps)
        name = f"train {training.preset}, batch {training.batch_size}" + (", graphs" if graphs else "")
        command = slotlab("bench", "train", *what, "--device", device, "--json")
        yield Part(name, command, 75, partial(training_figures, on_gpu=device != "cpu"), training.key)


MACHINE = {  # doctor's words for what a run on a GPU depends on, and what their absence means
    "nvidia_driver": "–",
    "torch_cuda": "–",
    "gpus": "none",
    "gpu_capability": "no GPU",
    "gpu_memory": "no GPU",
    "page_locked": "not tried: no GPU",
    "compiler": "–",
    "wsl": "no",
}


def machine_figures(found: Found, _: Found) -> Iterator[Figure]:
    for name, absent in MACHINE.items():
        value = found.get(name, absent)
        yield Figure(name.replace("_", " "), note=", ".join(value) if isinstance(value, list) else str(value))


def plan_figures(_: Found, device: Found) -> Iterator[Figure]:
    if device:
        yield Figure("device", note=f"{device['title']}: {device['source']}")


def extraction_figures(found: Found, foretold: Found) -> Iterator[Figure]:
    for rate in found["patterns"]:
        note = f"{rate['precision']}, batch {rate['batch_size']}"
        yield Figure("with decoding and writing", rate["frames_per_s"], None, "frames/s", note)
        yield Figure("the bare model", rate["limit_frames_per_s"], foretold.get("frames_per_s"), "frames/s")
        yield Figure("the one of the other", rate["ratio"], None, "share")


def stream_figures(found: Found, foretold: Found) -> Iterator[Figure]:
    keys = {"stream": "bytes_per_s", "cold": "cold_bytes_per_s"}
    for rate in found["patterns"]:
        told = foretold.get(keys.get(rate["name"].split()[0], ""))
        yield Figure(rate["name"], rate["bytes_per_s"], told, "bytes/s", f"{rate['ratio']:.2f} of {rate['limit']}")
    if foretold and not any(rate["name"].startswith("cold") for rate in found["patterns"]):
        yield Figure("cold", note="not measured; plan takes " + shown(foretold["cold_bytes_per_s"], "bytes/s"))


def training_figures(found: Found, foretold: Found, *, on_gpu: bool) -> Iterator[Figure]:
    for rate in found["patterns"]:
        bound = f"bound by {rate['bound']}" + (f", foretold {foretold['bound_by']}" if foretold else "")
        yield Figure("a step", rate["batch_size"] / rate["samples_per_s"], foretold.get("seconds"), "s", bound)
        told = rate["batch_size"] / foretold["seconds"] if foretold else None
        yield Figure("samples/s", rate["samples_per_s"], told, "samples/s", f"clips of {rate['clip']}")
        counted = rate["peak_memory_bytes"] if on_gpu else None
        note = "" if on_gpu else "torch counts it on a GPU alone"
        yield Figure("peak memory", counted, foretold.get("memory_bytes"), "bytes", note)
        if not on_gpu:
            yield Figure("resident memory of the process", rate["peak_memory_bytes"], None, "bytes")
        note = f"{rate['precision']}, {rate['flops_per_s'] / 1e12:.3g} TFLOP/s"
        yield Figure("FLOPs, of a matrix product's", rate["flop_utilisation"], None, "share", note)
        yield Figure("waiting for data", rate["wait_share"], None, "share")
        absent = "not known: NVML does not answer (pip install nvidia-ml-py)" if on_gpu else "no GPU"
        yield Figure("GPU busy", rate["gpu_utilisation"], None, "share", absent * (rate["gpu_utilisation"] is None))


def run(part: Part, seconds: float) -> Result:
    """Run a part for at most so long; whatever it leaves running is ended with it."""
    result = Result(part.name, " ".join(part.command[1:]))
    if part.lacks:
        result.outcome = f"not run: {part.lacks} is not installed"
        return result
    start = time.monotonic()
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
        result.outcome = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        result.outcome = f"cut off after {seconds:.0f} s"
    except BaseException:  # the whole is stopped
        os.killpg(process.pid, signal.SIGKILL)
        raise
    result.seconds = round(time.monotonic() - start, 1)
    result.found = parsed(out)
    if result.outcome != "done":
        result.said = (err or out)[-2000:]
    elif not result.found:
        result.said = out[-300:]
    return result


def parsed(out: str) -> dict[str, Any]:
    """The JSON of a process: one object; or the whole ones of many lines, by their keys, if it was cut off."""
    with contextlib.suppress(json.JSONDecodeError):
        whole: dict[str, Any] = json.loads(out)
        if "key" not in whole:
            return whole
    found = {}
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            item = json.loads(line)
            if isinstance(item, dict) and "key" in item:
                found[item["key"]] = item
    return found


@dataclass
class Findings:
    """All results so far, in two files."""

    out: Path
    card: str
    machine: str
    results: list[Result] = field(default_factory=list)
    foretold: dict[str, Found] = field(default_factory=dict)

    def keep(self, result: Result, part: Part | None = None) -> None:
        """Join a result with what was foretold of it, and write the files anew."""
        if result.name == FORETOLD:
            self.foretold = result.found
        if part is not None and result.found:
            with contextlib.suppress(LookupError):  # half of what was asked for
                result.figures = [*part.figures(result.found, self.foretold.get(part.key, {}))]
        self.results.append(result)
        parts = [asdict(result) for result in self.results]
        for each, of in zip(parts, self.results, strict=True):
            each["figures"] = [asdict(figure) | {"ratio": figure.ratio} for figure in of.figures]
        self.out.mkdir(parents=True, exist_ok=True)
        figures = {"device": self.card, "machine": self.machine, "parts": parts}
        write_durably(self.out / "gpu.json", json.dumps(figures, indent=1).encode())
        write_durably(self.out / "gpu.md", table(f"{self.card}, {self.machine}", self.results).encode())
        print(f"{result.name}: {result.outcome}, {result.seconds} s", flush=True)
        for figure in result.figures:
            name, measured, foretold, _ = figure.cells
            print(f"  {name}: {measured}" + (f" (plan: {foretold})" if figure.foretold else ""), flush=True)


CAPTION = (
    "Foretold: what `slotlab plan` says of the same work, eager steps also beside graphs; the last column is measured "
    "over foretold."
)


def table(title: str, results: list[Result]) -> str:
    lines = [f"# {title}", "", CAPTION, "", "| part | | measured | foretold | ratio |", "|---|---|---|---|---|"]
    for result in results:
        lines.append(f"| **{result.name}** | {result.seconds} s | {result.outcome} | | |")
        lines += [f"| | {' | '.join(cell.replace('|', '/') for cell in figure.cells)} |" for figure in result.figures]
    for result in results:
        if result.said:
            lines += ["", f"`{result.command}`:", "", "```", result.said.strip(), "```"]
    return "\n".join(lines) + "\n"


def prepare(out: Path, device: str, small: bool) -> tuple[Path, Result]:
    """The store that streams and steps read: the embedded sample, once with published weights, else with random."""
    few, limit = (("--max-videos", 1, "--frame-stride", 2), PATIENCE * STORE) if small else ((), STORE)
    for name, weights in (("dinov2", ()), ("random", ("--weights", "random"))):
        cache = (out / f"{name}{'-small' * small}.zarr").resolve()
        options = ("--out", cache, "--device", device, "--json", *few, *weights)
        result = run(Part(f"store, {name}", slotlab("extract", "--backbone", "dinov2", *options), limit), limit)
        if result.outcome == "done":
            break
    slow = ", on a drive of Windows, several times slower" * on_windows_drive(out)
    result.figures = [Figure("where it lies", note=f"{cache}{slow}")]
    return cache, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it")
    parser.add_argument("--cache", type=Path, help="a store to read; default: one of the embedded sample, made first")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that runs

    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here (slotlab doctor says why); to try it: --device cpu --small")
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "no GPU"
    findings = Findings(args.out, card, machine(torch.device(args.device)))

    def attempt(part: Part) -> None:
        left = end - time.monotonic()
        limit = (PATIENCE if args.small else 1) * part.limit
        result = run(part, min(limit, left)) if left > LEAST else Result(part.name, " ".join(part.command[1:]))
        findings.keep(result, part)

    attempt(Part("machine", slotlab("doctor", "--json"), 60, machine_figures))
    if args.cache is not None:
        cache = args.cache.resolve()
    else:
        cache, made = prepare(args.out, args.device, args.small)
        findings.keep(made)
    for part in parts(args.device, cache, args.small):
        attempt(part)
    print(f"\n{args.out / 'gpu.md'}")
    sys.exit(any(result.outcome != "done" for result in findings.results))


if __name__ == "__main__":
    main()
