"""What a GPU has to show, in order of value, each part under a limit of its own, all of it in ten minutes.

    python -m benchmarks.gpu [--out FOLDER] [--device cuda] [--minutes 10] [--cache STORE] [--small]

Runs from a checkout, without installing the package. Every part is a process: the tests on CUDA, extraction beside the
bare model, the stream from disk, host and device, and training steps of the presets over batch sizes, with CUDA graphs
and without. After each part ``gpu.json`` and ``gpu.md`` are written anew, so that what was measured stays when the rest
is cut off. A part that fails or takes too long is a row that says so. ``--small`` makes every part short enough to try
the whole on a CPU. Where the published weights cannot be had, the backbone's are random: rates are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache.store.durable import write_durably

LEAST = 5.0  # seconds that a part is begun with


@dataclass(frozen=True)
class Part:
    """One process: its name, its command, its limit in seconds, and the rows that its JSON gives."""

    name: str
    command: tuple[str, ...]
    limit: float
    rows: Callable[[dict[str, Any]], Iterator[tuple[str, str]]] = lambda _: iter(())


@dataclass
class Result:
    """What came of a part."""

    name: str
    command: str
    outcome: str = "not begun: the time was up"
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)  # the command's JSON
    said: str = ""  # the end of its stderr, where it failed
    rows: list[tuple[str, str]] = field(default_factory=list)


def slotlab(*args: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "cli", *map(str, args))


def parts(device: str, cache: Path, small: bool) -> Iterator[Part]:
    """Every part, the most valuable first."""
    few = ("--rounds", 1) if small else ()
    yield Part("doctor", slotlab("doctor", "--json"), 60)
    if device != "cpu":
        yield Part("tests on CUDA", (sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-p", "no:xdist"), 150)
    bench = slotlab("bench", "extract", "--weights", "random", "--device", device, "--json", *few)
    yield Part("extraction", (*bench, *(("--videos", "1") if small else ())), 90, extraction_rows)
    for residence in ("disk", "host", "device"):
        options = ("--residence", residence, "--no-cold", "--device", device, "--json", *few)
        yield Part(f"stream from {residence}", slotlab("bench", "stream", "--cache", cache, *options), 45, stream_rows)
    steps = ("--steps", 2, "--rounds", 1) if small else ("--steps", 10, "--rounds", 3)
    for preset, batches, graphs in LADDER:
        for size in (4,) if small else batches:
            for compiled in (False, True) if graphs and not small else (False,):
                sets = ("--set", "optim.precision=bfloat16", *GRAPHS) if compiled else PRECISION[device == "cpu"]
                command = ("--cache", cache, "--preset", preset, "--batch-size", size, *sets, *steps)
                name = f"train {preset}, batch {size}" + (", graphs" if compiled else "")
                yield Part(name, slotlab("bench", "train", *command, "--device", device, "--json"), 75, training_rows)


GRAPHS = ("--set", "optim.compile=true", "--set", "optim.cuda_graphs=true")
PRECISION = {True: (), False: ("--set", "optim.precision=bfloat16")}  # on a CPU bfloat16 may be emulated
LADDER = (  # preset, batch sizes, whether with CUDA graphs, too
    ("default", (64, 256), True),
    ("dinosaur", (64, 256, 1024), True),
    ("log-2026-video", (8, 64), True),
    ("videosaur", (64,), True),
    ("slotcontrast", (64,), True),
    ("savi-dinosaur", (64,), True),
    ("dinosaur-ar", (64,), True),
    ("mix", (64,), True),
)


def extraction_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for rate in found["patterns"]:
        yield "frames/s", f"{rate['frames_per_s']:.0f} ({rate['precision']}, batch {rate['batch_size']})"
        yield "of the bare model's rate", f"{rate['ratio']:.2f}"


def stream_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for rate in found["patterns"]:
        yield rate["name"], f"{rate['bytes_per_s'] / 1e9:.1f} GB/s, {rate['ratio']:.2f} of {rate['limit']}"


def training_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for rate in found["patterns"]:
        if "does_not_fit" in rate:
            yield "memory", "does not fit"
            continue
        yield "samples/s", f"{rate['samples_per_s']:.0f}, bound by {rate['bound']}, waiting {rate['wait_share']:.1%}"
        yield "of the matrix product's FLOPs", f"{rate['flop_utilisation']:.1%} ({rate['precision']})"
        yield "peak memory", f"{rate['peak_memory_bytes'] / 1e9:.2f} GB" if rate["peak_memory_bytes"] else "–"
        if rate["gpu_utilisation"] is not None:
            yield "GPU busy", f"{rate['gpu_utilisation']:.0%}"


def run(part: Part, seconds: float) -> Result:
    """Run a part for at most so long; whatever it leaves running is ended with it."""
    result = Result(part.name, " ".join(part.command[1:]))
    start = time.monotonic()
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
        result.outcome = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        result.outcome = f"cut off after {seconds:.0f} s"
    result.seconds = round(time.monotonic() - start, 1)
    if result.outcome == "done" and out.startswith("{"):
        result.found = json.loads(out)
        result.rows = [*part.rows(result.found)]
    else:
        result.said = (err or out)[-2000:] if result.outcome != "done" else out[-300:]
    return result


def table(title: str, results: list[Result]) -> str:
    lines = [f"# {title}", "", "| part | | figure |", "|---|---|---|"]
    for result in results:
        lines.append(f"| **{result.name}** | {result.seconds} s | {result.outcome} |")
        lines += [f"| | {name} | {value} |" for name, value in result.rows]
    for result in results:
        if result.said:
            lines += ["", f"`{result.command}`:", "", "```", result.said.strip(), "```"]
    return "\n".join(lines) + "\n"


def prepare(cache: Path, device: str, small: bool, seconds: float) -> Result:
    """The store that streams and steps read: the embedded sample, once with published weights, else with random."""
    few = ("--max-videos", 2, "--frame-stride", 2) if small else ()
    for weights in ((), ("--weights", "random")):
        command = slotlab(
            "extract", "--backbone", "dinov2", "--out", cache, "--device", device, "--json", *few, *weights
        )
        result = run(Part("store" + (" (random weights)" if weights else ""), command, seconds), seconds)
        if result.outcome == "done":
            break
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cache", type=Path, help="a store to read; default: one of the embedded sample, made first")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes

    import torch

    from featcache.machine import machine

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here (slotlab doctor says why); to try it: --device cpu --small")
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "no GPU"
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        figures = {"device": card, "machine": machine(), "parts": [*map(asdict, results)]}
        args.out.mkdir(parents=True, exist_ok=True)
        write_durably(args.out / "gpu.json", json.dumps(figures, indent=1).encode())
        write_durably(args.out / "gpu.md", table(f"{card}, {machine()}", results).encode())
        print(
            f"{result.name}: {result.outcome}, {result.seconds} s", *map(": ".join, result.rows), sep="\n  ", flush=True
        )

    cache = args.cache or args.out / ("small.zarr" if args.small else "dinov2.zarr")
    if args.cache is None:
        keep(prepare(cache, args.device, args.small, 180))
    for part in parts(args.device, cache, args.small):
        left = end - time.monotonic()
        keep(run(part, min(part.limit, left)) if left > LEAST else Result(part.name, " ".join(part.command[1:])))
    print(f"\n{args.out / 'gpu.md'}")
    sys.exit(any(result.outcome != "done" for result in results))


if __name__ == "__main__":
    main()
