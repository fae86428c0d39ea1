"""Statistics of natural pictures: made from stores, and judged beside statistics of the pictures themselves.

    python -m benchmarks.natural write STORE:SPLIT [STORE:SPLIT ...] [--of TEXT]
    python -m benchmarks.natural judge STORE:SPLIT [--from STORE:SPLIT ...] [--numbers 1 4 16 64] [--cut 0.6]

``write`` merges the splits' moments into the file that the package ships for their backbone. ``judge`` scores
training-free segments of a split with masks, whitened by the shipped statistics (or by those of other splits), and by
the segmented pictures' own, so many at a time: with 4, every four pictures are whitened by their own 1024 tokens.
"""

from __future__ import annotations

import argparse
import functools
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import report
from featcache.moments import Moments
from featcache.store.reading import FeatureStore, Split
from slotlab.models.normalise import Normaliser
from slotlab.models.segments import CUT, SHRINKAGE, soft_segments
from slotlab.models.whitening import Natural, natural, save_natural
from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap
from slotlab.scoring.tables import count_labels, mask_tables, stacked


def split_of(name: str) -> Split:
    path, _, split = name.rpartition(":")
    return FeatureStore.open(Path(path))[split]


def spec_of(name: str) -> tuple[str, str, tuple[int, int]]:
    """Backbone, tap and grid of a split's store."""
    spec = FeatureStore.open(Path(name.rpartition(":")[0])).spec
    tap = next(iter(spec.taps))
    return spec.backbone, tap, spec.taps[tap].grid


def merged(moments: Iterable[Moments]) -> Moments:
    return functools.reduce(operator.add, moments)


def write(names: list[str], pictures: str) -> None:
    backbone, tap, grid = spec_of(names[0])
    found = merged(split_of(name).statistics(tap) for name in names)
    weights = FeatureStore.open(Path(names[0].rpartition(":")[0])).spec.model["weights_sha256"]
    about = {"of": pictures, "weights_sha256": weights, "grid": "{}x{}".format(*grid)}
    statistics = Natural(torch.from_numpy(found.mean), torch.from_numpy(found.covariance), found.frames)
    path = save_natural(statistics, backbone, tap, about)
    report("natural", {"written": str(path), "bytes": path.stat().st_size, "pictures": found.frames, **about})


def judge(name: str, others: list[str], numbers: list[int], cut: float) -> None:
    backbone, tap, grid = spec_of(name)
    split = split_of(name)
    labels = count_labels(split)
    order = torch.randperm(len(split.videos), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [split.tokens(tap, video)[:1].float() for video in order]  # (1, N, D) each
    truth = [torch.from_numpy(split.segmentations(video)[:1]) for video in order]

    def score(whitened: list[Tensor]) -> dict[str, float]:
        tables = []
        for one, true in zip(whitened, truth, strict=True):
            tables.append(mask_tables(soft_segments(one, grid, cut).unflatten(-1, grid), true, labels))
        several = torch.tensor([len(true.unique()) > 2 for true in truth])
        table = stacked(tables)
        fg_ari = adjusted_rand_index(table, foreground=True)[several].nanmean()
        return {"fg_ari": round(float(fg_ari), 3), "mbo": round(float(mean_best_overlap(table).nanmean()), 3)}

    found: dict[str, Any] = {}
    if others:
        whiten = Normaliser.from_moments(
            "whiten", merged(split_of(o).statistics(tap) for o in others), SHRINKAGE, "channel"
        )
        found["others"] = score([whiten(one) for one in tokens])
    elif shipped := natural(backbone, tap):
        whiten = Normaliser.from_statistics("whiten", shipped.mean, shipped.covariance, shrinkage=SHRINKAGE)
        found["shipped"] = score([whiten(one) for one in tokens])
    for number in numbers:
        whitened = []
        for start in range(0, len(tokens), number):
            start = max(0, min(start, len(tokens) - number))  # the last ones are completed by those before
            own = Normaliser.from_moments(
                "whiten", Moments.from_tokens(torch.cat(tokens[start : start + number])), SHRINKAGE, "channel"
            )
            whitened += [own(one) for one in tokens[len(whitened) : start + number]]
        found[f"own {number}"] = score(whitened)
    report("natural", {"split": name, "pictures": len(tokens), "cut": cut, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("write", "judge"))
    parser.add_argument("splits", nargs="+", metavar="STORE:SPLIT")
    parser.add_argument("--of", default="", help="what the pictures are, for the file")
    parser.add_argument("--cut", type=float, default=CUT)
    parser.add_argument("--from", dest="others", nargs="*", default=[], metavar="STORE:SPLIT")
    parser.add_argument("--numbers", type=int, nargs="*", default=[1, 4, 16, 64])
    args = parser.parse_args()
    if args.job == "write":
        write(args.splits, args.of)
    else:
        judge(args.splits[0], args.others, args.numbers, args.cut)


if __name__ == "__main__":
    main()
