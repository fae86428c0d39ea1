"""Where slots could go: as a world model says, at constant speed, half-way, to the nearer of both, or where they went.

    python -m benchmarks.futures RUN [--split validation]

RUN is a world model. Masks and features are decoded as the model's are, with its own spread; places alone differ. The
nearer place is chosen by where the slot came to be: what a perfect choice between two futures would reach.

A row of scores for each, at 1, 2, 4 and 8 frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slotlab.dynamics.measures import MEASURES
from slotlab.dynamics.rollout import features_at, load_dynamics, roll_out
from slotlab.dynamics.rows import ROWS, Clip, Predicted, Row, velocity_masks
from slotlab.models.dynamics.state import PLACE

AHEAD = (1, 2, 4, 8)  # frames
KEYS = ("mse", "mbo", "mbo_moving", "mbo_free", "mbo_hit", "centre")
DIGITS = {measure.key: measure.digits for measure in MEASURES}

Places = Callable[[Clip, Tensor, Tensor], Tensor]  # of the model's and constant speed's (H, K, 2), in patches


def steady(clip: Clip, model: Tensor, constant: Tensor) -> Tensor:
    return constant


def true(clip: Clip, model: Tensor, constant: Tensor) -> Tensor:
    return clip.vectors[clip.burn_in :, :, PLACE]


def half(clip: Clip, model: Tensor, constant: Tensor) -> Tensor:
    return (model + constant) / 2


def nearer(clip: Clip, model: Tensor, constant: Tensor) -> Tensor:
    """The place that is nearer to where the slot came to be."""
    came = true(clip, model, constant)
    off, steady_off = ((of - came).norm(dim=-1, keepdim=True) for of in (model, constant))
    return torch.where(off <= steady_off, model, constant)


def placed(at: Places) -> Row:
    """The model's row with its slots at other places."""

    @torch.no_grad()
    def predicted(clip: Clip) -> Predicted:
        future = clip.model.roll_out(clip.seen, clip.steps)
        constant = velocity_masks(clip).places
        assert constant is not None
        future[0, ..., PLACE] = at(clip, future[0, ..., PLACE].clone(), constant)
        pictures = clip.model.decode(clip.seen, future)
        features = clip.spelt(pictures.features) + clip.model.texture(clip.seen, future, clip.dense[clip.last])
        return Predicted(features[0], pictures.sharp[0], future[0, ..., PLACE])

    return predicted


TRIED: dict[str, tuple[str, Row]] = {
    "rollout": ("the model", ROWS["rollout"][1]),
    "velocity_masks": ROWS["velocity_masks"],
    "steady": ("the model at constant velocity's places", placed(steady)),
    "half": ("half-way between both", placed(half)),
    "nearer": ("at the nearer of both", placed(nearer)),
    "true": ("at the true places", placed(true)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="validation")
    args = parser.parse_args()
    loaded = load_dynamics(args.run)
    of = roll_out(loaded, features_at(loaded.store), loaded.split(args.split), TRIED)
    print(f"| at {', '.join(map(str, AHEAD))} | " + " | ".join(KEYS) + " |")
    print("|---" * (1 + len(KEYS)) + "|")
    for row, (title, _) in TRIED.items():
        told = []
        for key in KEYS:
            means, digits = of.means(row, key), DIGITS[key.split("_")[0]]
            found = [means[ahead - 1] for ahead in AHEAD if ahead <= of.steps]
            told.append(", ".join("–" if value is None else f"{value:.{digits}f}" for value in found))
        print(f"| {title} | " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()
