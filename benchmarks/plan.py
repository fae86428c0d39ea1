"""What a plan says of a step on the CPU, against the step itself.

    OMP_NUM_THREADS=1 python -m benchmarks.plan [--presets ...] [--batch-size 4] [--side 16] [--dim 384] [--rounds 5]

Memory is the highest sum of bytes that torch's allocator gives out while a model is built and takes two steps. The
utilisation is the bound of a step over the time that it takes, with the rates of products and of copies measured in the
same rounds. All times are CPU seconds of one thread, as far as possible those that an idle machine would take.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.step import peak_bytes
from featcache.stream.staging import Format
from slotlab.config.load import load_config, presets
from slotlab.config.schema import Config
from slotlab.models.build import empty_model
from slotlab.models.inputs import Features, Frames, ModelInput, Tracks
from slotlab.models.randomness import Draws
from slotlab.planning.bound import UTILISATION, Bound
from slotlab.planning.devices import measured
from slotlab.training.cost import count_step
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep, freeze_unreached
from slotlab.training.train import batch_samples

CPU = torch.device("cpu")


def compare(preset: str, batch_size: int, side: int, dim: int, rounds: int) -> dict[str, float | int]:
    config = load_config(preset, None, optim__batch_size=batch_size)
    inputs, batch = sizes(config, side, dim)
    on_cpu, on_gpu = (count_step(config, inputs, batch, on_gpu=gpu) for gpu in (False, True))
    features = (255 * torch.rand(batch.shape)).to(batch.dtype)
    features = features if config.data.clip > 1 else features[:, 0]
    taken = []

    def build_and_step() -> None:
        step = build(config, inputs, features)
        for _ in range(2):
            step(features)

    peak = peak_bytes(build_and_step, CPU)
    step = build(config, inputs, features)
    step(features)
    for _ in range(rounds):
        bound = Bound.of(on_cpu, measured(CPU, config.optim.precision), config.optim.precision)
        began = time.perf_counter()
        step(features)
        taken.append((time.perf_counter() - began, bound.together))
    return {
        "counted_mb": round(on_cpu.peak / 1e6, 1),
        "allocated_mb": round(peak / 1e6, 1),
        "counted_of_allocated": round(on_cpu.peak / peak, 3),
        "gflop": round(on_cpu.flops / 1e9, 2),
        "expected_seconds": round(median(bound for _, bound in taken) / UTILISATION, 4),
        "step_seconds": round(median(seconds for seconds, _ in taken), 4),
        "utilisation": round(median(bound / seconds for seconds, bound in taken), 3),
        "operations_on_a_gpu": on_gpu.operations,
        "operations_on_a_cpu": on_cpu.operations,
    }


def sizes(config: Config, side: int, dim: int) -> tuple[ModelInput, Format]:
    samples = batch_samples(config)
    if config.model.kind == "pixel":
        pixels = config.model.resolution
        return Frames("video", (pixels, pixels), 3), Format((*samples, 256, 256, 3), torch.uint8)
    if config.model.kind == "dynamics":
        slots = 13
        tokens = Format((*samples, slots, dim + side**2 + 2), torch.float16)
        return Tracks("tracks", (side, side), dim, "block12", slots, refined=True), tokens
    return Features("block12", (side, side), dim), Format((*samples, side**2, dim), torch.float16)


def build(config: Config, inputs: ModelInput, features: Tensor) -> TrainStep:
    model = empty_model(config, inputs)
    if not config.loss.reconstructs:
        freeze_unreached(model, config, features[:1], Draws(0))
    return TrainStep(config, model, Ranks(CPU))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=presets())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--side", type=int, default=16, help="patches a side")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    found = {}
    with patch("time.perf_counter", time.process_time):
        for preset in args.presets:
            found[preset] = compare(preset, args.batch_size, args.side, args.dim, args.rounds)
            print(preset, found[preset], file=sys.stderr, flush=True)
    report("plan", {"batch_size": args.batch_size, "presets": found})


if __name__ == "__main__":
    main()
