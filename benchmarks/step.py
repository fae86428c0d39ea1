"""A training step of the broadcast decoder's model against the same mathematics as published.

    python -m benchmarks.step [--preset dinosaur] [--batch-size 4] [--rounds 5] [--device auto] [--variants ...]

The reference applies every layer of the decoder to every slot at every patch, in float32 and eager, and keeps what
autograd keeps; all else is the same model with the same weights. A step is forward, loss, backward, clipping and
Adam. Memory is the highest sum of bytes allocated during forward and backward (on a CPU by the profiler's record of
the allocator; on a GPU by the allocator's own), gradients of the parameters included. Beside it stands what no exact
step in float32 can pass: the matrix products of the hidden layers by themselves, which have to be made for every slot
and patch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import alternate, paired_ratio, report, timed
from featcache.machine import pick_device
from slotlab.config.load import load_config
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.models.decoders.base import Decoded, Decoder
from slotlab.models.decoders.broadcast import MLPDecoder
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import Attended
from slotlab.models.slot_model import SlotModel
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep

REFERENCE = "published"
LIMIT = "limit"


class PublishedDecoder(Decoder):
    """DINOSAUR's MLP decoder as its paper writes it, with the weights of ours."""

    def __init__(self, ours: MLPDecoder) -> None:
        super().__init__(ours.sizes, ours.config)
        self.ours = ours
        # One last layer gives both token and mask logit.
        self.last = nn.Linear(ours.config.hidden, ours.sizes.dim + 1)
        with torch.no_grad():
            self.last.weight.copy_(torch.cat([ours.heads.tokens.weight, ours.mask.weight]))
            self.last.bias.copy_(torch.cat([ours.heads.tokens.bias, ours.mask.bias]))
        ours.heads.requires_grad_(False)
        ours.mask.requires_grad_(False)

    def forward(self, attended: Attended, target: Tensor, draws: Draws) -> Decoded:
        placed = attended.slots[:, :, None] + self.ours.position  # (B, K, N, S)
        decoded = self.last(self.ours.hidden(self.ours.first(placed)))  # (B, K, N, D + 1)
        tokens, logits = decoded.split((self.sizes.dim, 1), -1)
        masks = (logits / self.config.mask_temperature).softmax(1)  # (B, K, N, 1)
        return Decoded((tokens * masks).sum(1), masks[..., 0])


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    published: bool = False
    decoder: dict[str, Any] = field(default_factory=dict)
    bfloat16: bool = False
    compiled: bool = False
    accumulate: int = 1  # as optim.accumulate


VARIANTS = {
    REFERENCE: Variant(published=True),
    "identities": Variant(),
    "identities, accumulate=4": Variant(accumulate=4),
    "identities, recompute": Variant(decoder={"recompute": True}),
    "published, bfloat16": Variant(published=True, bfloat16=True),
    "identities, bfloat16": Variant(bfloat16=True),
    "identities, bfloat16, compile": Variant(bfloat16=True, compiled=True),
    "identities, bfloat16, 64 patches": Variant(decoder={"patches": 64}, bfloat16=True),
}


def make_step(config: Config, variant: Variant, side: int, dim: int, device: torch.device) -> TrainStep:
    """The step of one variant, its weights those of all others."""
    assert isinstance(config.model, SlotAttentionConfig)
    parts = config.model.model_copy(update={"decoder": config.model.decoder.model_copy(update=variant.decoder)})
    torch.manual_seed(0)
    model = SlotModel(parts, Normaliser("none", dim), (side, side)).to(device)
    if variant.published:
        assert isinstance(model.decode, MLPDecoder)
        model.decode = PublishedDecoder(copy.deepcopy(model.decode)).to(device)
    optim = config.optim.model_copy(
        update={
            "precision": "bfloat16" if variant.bfloat16 else "float32",
            "compile": variant.compiled,
            "accumulate": variant.accumulate,
        }
    )
    return TrainStep(config.model_copy(update={"model": parts, "optim": optim}), model, Ranks(device))


def step_rate(step: TrainStep, features: Tensor) -> float:
    """Steps a second, of one."""

    def work() -> int:
        step(features)
        return 1

    return timed(work, features.device)


class HiddenProducts:
    """The matrix products of the hidden layers, forward and backward, and nothing else."""

    def __init__(self, decoder: Decoder, samples: int, slots: int, device: torch.device) -> None:
        width, self.layers = decoder.config.hidden, decoder.config.layers - 1
        self.rows = torch.randn(samples * slots * decoder.sizes.patches, width, device=device)
        self.weight = torch.randn(width, width, device=device)
        self.out, self.gradient = torch.empty_like(self.rows), torch.empty_like(self.weight)

    def per_second(self) -> float:
        """How often the products of one step can be made."""
        began = time.perf_counter()
        for _ in range(self.layers):
            torch.mm(self.rows, self.weight.T, out=self.out)  # forward
            torch.mm(self.rows, self.weight, out=self.out)  # gradient of the rows
            torch.mm(self.rows.T, self.out, out=self.gradient)  # and of the weight
        if self.rows.is_cuda:
            torch.cuda.synchronize()
        return 1 / (time.perf_counter() - began)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The highest sum of bytes allocated while ``work`` runs, above what was before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="dinosaur")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--side", type=int, default=16, help="patches per side")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    others = [name for name in VARIANTS if name != REFERENCE]
    parser.add_argument(
        "--variants", nargs="+", choices=others, default=others, help="variants to measure beside the published one"
    )
    args = parser.parse_args()

    device, config = pick_device(args.device), load_config(args.preset)
    features = torch.randn(args.batch_size, args.side**2, args.dim, generator=torch.Generator().manual_seed(1))
    features = features.to(device)
    steps = {
        name: make_step(config, VARIANTS[name], args.side, args.dim, device) for name in (REFERENCE, *args.variants)
    }
    # Warms up, compiles.
    first = {name: step.gradients(features)[1].item() for name, step in steps.items()}
    peaks = {name: peak_bytes(partial(step.gradients, features), device) for name, step in steps.items()}
    rivals: dict[str, Callable[[], float]] = {name: partial(step_rate, step, features) for name, step in steps.items()}
    decoder = steps[REFERENCE].model.decode
    assert isinstance(decoder, Decoder)
    if decoder.config.layers > 1:
        rivals[LIMIT] = HiddenProducts(decoder, args.batch_size, config.model.slots, device).per_second
    rates = alternate(rivals, args.rounds)
    report(
        "step",
        {
            "preset": args.preset,
            "batch_size": args.batch_size,
            "limit_of_float32": round(paired_ratio(rates, LIMIT, REFERENCE), 2) if LIMIT in rates else None,
            "variants": {
                name: {
                    "loss": round(first[name], 5),
                    "seconds": round(1 / statistics.median(rates[name]), 3),
                    "speed": round(paired_ratio(rates, name, REFERENCE), 2),
                    "peak_mb": round(peaks[name] / 1e6, 1),
                    "memory": round(peaks[name] / peaks[REFERENCE], 3),
                }
                for name in steps
            },
        },
    )


if __name__ == "__main__":
    main()
