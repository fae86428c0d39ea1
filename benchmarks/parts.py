"""What each part of `objects` is worth: the model on several sets, with one part left out at a time.

    python -m benchmarks.parts --home STORE[:SPLIT] NAME=STORE[:SPLIT] ... [--first NAME=N ...] [--stride 1]
        [--steps 200] [--seed 0] [--video] [--only PART ...] [--set KEY=VALUE ...] [--folder runs/parts] [--json]

Parts of training are left out in training and in use, from runs of ``--steps`` steps; parts of use alone, from the
whole model's run. ``--first moving=4`` scores the first 4 videos of a split. ``--set`` changes settings
of all runs, which then want a folder of their own. Scores are those of :mod:`benchmarks.sets`, of plain masks; frames
are taken apart, or with ``--video`` followed: then scores are of whole videos, and the parts are the tracker's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import report
from benchmarks.sets import Pair, model_masks, scores, split_of, trained
from featcache.store.reading import Split
from slotlab.models import segments
from slotlab.models.agglomerative import model, tracking
from slotlab.models.agglomerative.model import AgglomerativeModel
from slotlab.runs.loaded import load_run
from slotlab.scoring.tables import require_truth


def keys_without_correction(self: AgglomerativeModel, tokens: Tensor) -> Tensor:
    return F.normalize(self.line(self.directions(tokens)).float(), dim=-1)


def keys_without_map(self: AgglomerativeModel, tokens: Tensor) -> Tensor:
    directions = self.directions(tokens)
    return F.normalize((directions[..., : self.config.slot_dim] + self.bend(directions)).float(), dim=-1)


def segments_alone(self: AgglomerativeModel, keys: Tensor) -> Tensor:
    return self.segments(keys, self.config.cut).mT.log()


def as_they_are(z: Tensor, grid: tuple[int, int]) -> Tensor:
    return z


@dataclass(frozen=True)
class Part:
    """How to leave a part out: attributes of modules or classes, settings of training, settings of use."""

    without: tuple[tuple[object, str, Any], ...] = ()
    training: tuple[str, ...] = ()
    use: Mapping[str, object] = field(default_factory=dict)
    trains: bool = False  # whether training differs
    tracks: bool = False  # whether it matters in videos alone


PARTS: Mapping[str, Part] = {
    "whole": Part(trains=True),
    "training": Part(training=("optim.learning_rate=1e-12",), trains=True),
    "learnt map": Part(((AgglomerativeModel, "keys", keys_without_map),), trains=True),
    "learnt correction": Part(((AgglomerativeModel, "keys", keys_without_correction),), trains=True),
    "another frame": Part(training=("data.clip=1",), trains=True),
    "coarser segments teach": Part(training=("model.train_cut=0.35",), trains=True),
    "the mean taken away": Part(training=("model.centre=0",), trains=True),
    "place in the linkage": Part(((segments, "POSITION", 0.0),)),
    "neighbours in the linkage": Part(((segments, "smoothed", as_they_are),)),
    "competition": Part(((AgglomerativeModel, "compete", segments_alone),)),
    "surroundings in the competition": Part(use={"near_weight": 0.0}),
    "neighbours in the competition": Part(((model, "smoothed", as_they_are),)),
    "the past as a prior": Part(use={"prior_weight": 0.0}, tracks=True),
    "identities by small overlaps": Part(((tracking, "LEAST_OVERLAP", 0.1),), tracks=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="+", metavar="NAME=STORE[:SPLIT]")
    parser.add_argument("--home", required=True)
    parser.add_argument("--first", nargs="*", default=[], metavar="NAME=N")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(PARTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/parts"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    first = dict(pair.split("=", 1) for pair in args.first)
    sets: dict[str, tuple[Split, list[int]]] = {}
    for pair in args.sets:
        name, place = pair.split("=", 1)
        split = require_truth(split_of(place))
        videos = range(len(split.manifest))
        sets[name] = split, list(videos[: int(first.get(name, len(videos)))])
    found = {}
    for name in args.only or [name for name in PARTS if name == "whole" or PARTS[name].tracks == args.video]:
        found[name] = dict(without(name, PARTS[name], sets, args))
        if not args.json:
            print(
                f"| {name} | " + " | ".join("{:.3f}/{:.3f}".format(*pair) for pair in found[name].values()), flush=True
            )
    if args.json:
        report("parts", found)


def without(
    name: str, part: Part, sets: Mapping[str, tuple[Split, list[int]]], args: argparse.Namespace
) -> Iterator[tuple[str, Pair]]:
    """FG-ARI and mBO of each set without a part."""
    options = [f"seed={args.seed}", f"optim.steps={args.steps}", *args.set, *part.training]
    with ExitStack() as stack:
        for owner, attribute, value in part.without:
            stack.enter_context(patch.object(owner, attribute, value))
        run = trained("objects", args.home, args.folder / (name if part.trains else "whole"), *options)
        for of, (split, videos) in sets.items():
            loaded = load_run(run, split.store.path)
            assert isinstance(loaded.model, AgglomerativeModel)
            loaded.model.config = loaded.model.config.model_copy(update={"tracking": args.video, **part.use})
            masks = model_masks(loaded, split, videos)
            yield of, scores(masks, split, videos, args.stride, plain=True, by_video=args.video)[""].pair


if __name__ == "__main__":
    main()
