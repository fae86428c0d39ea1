"""Scores of a run's masks at the frame's resolution: outlines, and what refinement and other binarisations change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from slotlab import display
from slotlab.binarise import BinarisedScores, parse_binarisation
from slotlab.boundaries import BoundaryScores
from slotlab.draws import Draws
from slotlab.evaluate import LoadedRun, count_labels, on_grid
from slotlab.metrics import masks_to_labels
from slotlab.references import grid_masks
from slotlab.refine import Method, refine
from slotlab.scores import Scores

GAINS = ("fg_ari", "mbo", "miou", "boundary_f")


def outline_scores(
    loaded: LoadedRun,
    split_name: str | None = None,
    method: Method | None = None,
    binarisations: Sequence[str] = (),
) -> dict[str, Any]:
    """``boundaries`` of a run's masks beside its grid's reference; where asked, ``refined`` and ``binarised``.

    The reference is the ground truth brought to the grid and back, as in :mod:`slotlab.references`. ``refined`` are
    the scores of the masks after ``method``, their ``gain`` over the plain ones, and the seconds that refinement took.
    Raises ``DataError`` when the split has no masks, ``UsageError`` for a method or a binarisation that is not known.
    """
    ways = [parse_binarisation(text) for text in binarisations]
    split = loaded.store[split_name or loaded.config.data.eval_split].require_complete()
    labels, size, grid, slots = count_labels(split), split.spec.frame_size, loaded.model.grid, loaded.model.slots
    plain, reference, refined = (BoundaryScores(size) for _ in range(3))
    plain_scores, refined_scores = Scores(), Scores()
    binarised = {way.name: BinarisedScores() for way in ways}
    seconds, frames = 0.0, 0
    for video in split.videos:
        truth = torch.from_numpy(split.segmentations(video))  # (T, H, W)
        ids = torch.full((len(truth),), video)
        masks = on_grid(loaded.segment(split, video).masks, grid)  # (T, K, h, w)
        on_host = masks.cpu()
        plain_scores.add(plain.add(masks_to_labels(on_host, size), truth, slots, labels), ids)
        reference.add(masks_to_labels(grid_masks(truth, grid, labels), size), truth, labels, labels)
        if method:
            pictures = torch.from_numpy(split.video(video))
            began = time.perf_counter()
            fine = refine(masks, pictures, method).cpu()  # waits for the device
            seconds += time.perf_counter() - began
            refined_scores.add(refined.add(masks_to_labels(fine, size), truth, slots, labels), ids)
        for way in ways:
            hard = way.label(on_host, size, Draws.of_step(loaded.config.seed, video))
            binarised[way.name].add(hard, truth, slots, labels)
        frames += len(truth)
    result: dict[str, Any] = {
        "boundaries": {"tolerance_px": plain.tolerance, **plain.summary(), "reference": reference.summary()}
    }
    if method:
        before = plain_scores.summary() | {"boundary_f": plain.mean_f()}
        after = refined_scores.summary() | {"boundary_f": refined.mean_f()}
        result["refined"] = {
            "method": method,
            **{key: after[key] for key in GAINS},
            "gain": {key: _difference(after[key], before[key]) for key in GAINS},
            "boundaries": refined.summary(),
            "seconds": seconds,
            "ms_per_frame": 1e3 * seconds / max(frames, 1),
        }
    if ways:
        result["binarised"] = {name: scores.summary() for name, scores in binarised.items()}
    return result


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def outlines_table(result: Mapping[str, Any]) -> Table:
    """What :func:`outline_scores` found, a column a kind of mask."""
    boundaries, refined = result["boundaries"], result.get("refined")
    kinds = {"this run": boundaries}
    if refined:
        kinds["refined"] = refined["boundaries"]
    kinds["grid's reference"] = boundaries["reference"]
    rows = []
    for key, title in (("boundary_f", "boundary F"), ("bleeding", "bleeding")):
        rows.append((title, *(found[key] for found in kinds.values())))
        for size, of in boundaries["by_area"].items():
            low, high = of["area_px"]
            values = (found["by_area"].get(size, {}).get(key) for found in kinds.values())
            rows.append((f"  {size}, {low}–{high} px", *values))
    return display.plain_table(("outlines", *kinds), rows, f"within {boundaries['tolerance_px']} px")


def gains_table(result: Mapping[str, Any]) -> Table:
    """Scores of refined and of otherwise binarised masks beside the plain ones."""
    plain = {**result, "boundary_f": result["boundaries"]["boundary_f"]}
    rows: list[tuple[Any, ...]] = [("this run", *(plain[key] for key in GAINS), None)]
    if refined := result.get("refined"):
        name = f"refined, {refined['method']}, {refined['ms_per_frame']:.0f} ms a frame"
        rows.append((name, *(refined[key] for key in GAINS), None))
        rows.append(("  gain", *(None if g is None else f"{g:+.3f}" for g in refined["gain"].values()), None))
    for name, scores in result.get("binarised", {}).items():
        rows.append((name, scores["fg_ari"], scores["mbo"], None, None, scores["unassigned"]))
    return display.plain_table(("masks", "FG-ARI", "mBO", "mIoU", "boundary F", "unassigned"), rows)
