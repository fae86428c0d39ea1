"""Our presets beside the public sources of their papers: what differs in a training pass, and how long a step takes.

    git clone https://github.com/martius-lab/videosaur CHECKOUT      (VideoSAUR, DINOSAUR)
    git clone https://github.com/martius-lab/slotcontrast CHECKOUT
    git clone https://github.com/amazon-science/object-centric-learning-framework CHECKOUT      (DINOSAUR)
    git clone https://github.com/gkakogeorgiou/spot CHECKOUT
    pip install --no-deps pytorch-lightning lightning-utilities torchmetrics einops omegaconf webdataset braceexpand \
        antlr4-python3-runtime==4.9.3 torchtyping typeguard==2.13.3
    OMP_NUM_THREADS=1 python -m benchmarks.source CHECKOUT --parity
    OMP_NUM_THREADS=1 python -m benchmarks.source CHECKOUT [--preset dinosaur] [--batch-size 4] [--rounds 7]

Both get the same ready features, so the backbone, which the sources run at every step, is in neither. Without
``--parity``, a step is forward, loss, backward, clipping and Adam (fused in ours), in float32. Nothing of a source is
in this repository.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import alternate, paired_ratio, report
from benchmarks.parity import parity
from benchmarks.sources import Source, source_of
from featcache.machine import pick_device
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.models.build import empty_model
from slotlab.models.inputs import Features
from slotlab.models.randomness import Draws
from slotlab.training.losses import losses, total

Loss = Callable[[], Tensor]


def ours(config: Config, features: Tensor) -> tuple[nn.Module, Loss]:
    *_, patches, dim = features.shape
    side = round(patches**0.5)
    model = empty_model(config, Features("", (side, side), dim)).to(features.device)
    return model, lambda: total(losses(model(features, Draws(0)), config.loss), config.loss)


def theirs(source: Source, config: Config, features: Tensor) -> tuple[nn.Module, Loss]:
    model, step = source.build(config, features)
    return model, lambda: step().loss


def stepper(model: nn.Module, loss: Loss, config: Config, fused: bool) -> Callable[[], float]:
    """A job: one step, and steps a second."""
    optimizer = torch.optim.Adam(model.parameters(), config.optim.learning_rate, fused=fused)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1 / (time.perf_counter() - began)

    return step


def speed(source: Source, preset: str, args: argparse.Namespace, device: torch.device) -> None:
    config = load_config(preset, None, ["data.normalize=none", *source.presets[preset]])
    shape = (args.batch_size, *([config.data.clip] if config.data.clip > 1 else []), args.side**2, args.dim)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(0)
    built = {"source": theirs(source, config, features), "ours": ours(config, features)}
    jobs = {name: stepper(*made, config, fused=name == "ours") for name, made in built.items()}
    for job in jobs.values():
        job()  # warms up
    rates = alternate(jobs, args.rounds)
    figures: dict[str, Any] = {
        name: {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "loss": round(float(loss().detach()), 4),
            "seconds": round(1 / statistics.median(rates[name]), 3),
        }
        for name, (model, loss) in built.items()
    }
    figures["speed"] = round(paired_ratio(rates, "ours", "source"), 2)
    report("source", {"preset": preset, "shape": list(shape)} | figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a source")
    parser.add_argument("--parity", action="store_true", help="what differs, with the same weights, noise and input")
    parser.add_argument("--preset", help="one of the presets that the source has; default: all of them")
    parser.add_argument("--batch-size", type=int, default=4, help="frames or clips in a batch")
    parser.add_argument("--side", type=int, default=16, help="patches per side")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    source, device = source_of(args.checkout), pick_device(args.device)
    if args.preset is not None and args.preset not in source.presets:
        parser.error(f"--preset {args.preset}: this source has {', '.join(source.presets)}")
    for preset in source.presets if args.preset is None else [args.preset]:
        if args.parity:
            shape = (args.batch_size, args.side, args.dim)
            found = parity(source, preset, shape, device)
            report("parity", {"preset": preset, "with": source.presets[preset], "shape": shape} | found)
        else:
            speed(source, preset, args, device)


if __name__ == "__main__":
    main()
