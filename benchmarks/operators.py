"""What a training step of every preset asks of a GPU: operations, FLOPs, bytes, memory. Nothing is computed.

    python -m benchmarks.operators [--presets ...] [--side 16] [--dim 384] [--kinds 12] [--plain]

Counted as `slotlab plan` counts (docs/planning.md), at the preset's own batch. An operation is a call of torch's
dispatcher that computes or copies: views are none, a call for a list of tensors (`_foreach_mul_`, `_fused_adam_`) is
one. What is outside of the forward pass, the losses and the backward pass is launched one by one under
CUDA graphs, too.
"""

from __future__ import annotations

import argparse
from collections import Counter

from benchmarks.harness import report
from benchmarks.plan import sizes
from slotlab.config.load import load_config, presets
from slotlab.models.repeated import Repeated
from slotlab.training.cost import count_step
from slotlab.training.train import batch_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=presets())
    parser.add_argument("--side", type=int, default=16, help="patches a side")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kinds", type=int, default=12, help="the most frequent operators to name")
    parser.add_argument("--plain", action="store_true", help="gradients of repeated layers after every call")
    args = parser.parse_args()
    if args.plain:
        Repeated.__call__ = lambda self, *inputs: self.module(*inputs)  # type: ignore[method-assign]
    found = {}
    for preset in args.presets:
        config = load_config(preset)
        cost = count_step(config, *sizes(config, args.side, args.dim), on_gpu=True)
        found[preset] = {
            "batch": list(batch_samples(config)),
            "trained_m": round(cost.parameters / 1e6, 2),
            "operations": cost.operations,
            "outside_of_passes": cost.operations - cost.passes,
            "gflop": round(cost.flops / 1e9, 1),
            "gb_moved": round(cost.bytes / 1e9, 2),
            "memory_gb": round(cost.peak / 1e9, 2),
            "most": dict(Counter(cost.operators).most_common(args.kinds)),
        }
    report("operators", {"presets": found})


if __name__ == "__main__":
    main()
