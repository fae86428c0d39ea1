from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from featcache.store.reading import FeatureStore, Split
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring import references as module
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap
from slotlab.scoring.references import (
    FLOORS,
    References,
    area_weights,
    floor_tables,
    floor_title,
    floors_asked,
    grid_reference,
    references,
)
from slotlab.scoring.scores import Scores
from slotlab.scoring.tables import UNKNOWN, stacked
from slotlab.training.train import train
from slotlab.words import Floors
from tests.synthetic import make_store
from tests.training import small


def _scene(size: int = 32) -> Tensor:
    """Segmentations (2, size, size): one frame with a square and a small disc, one empty."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    frame = torch.zeros(size, size, dtype=torch.uint8)
    frame[(y >= size // 8) & (y < size // 2) & (x >= size // 8) & (x < size // 2)] = 1
    frame[(y - 0.7 * size).square() + (x - 0.7 * size).square() < (size / 9) ** 2] = 2
    return torch.stack([frame, torch.zeros_like(frame)])


def test_the_reference_at_full_resolution_is_perfect() -> None:
    segmentations = _scene()
    tables = grid_reference(segmentations, (32, 32), 3)
    assert float(adjusted_rand_index(tables, foreground=True)[0]) == 1.0
    assert float(mean_best_overlap(tables)[0]) == 1.0
    assert torch.equal(tables[1], torch.diag(torch.tensor([1024, 0, 0])))


def test_the_reference_falls_with_the_grid_and_counts_every_pixel() -> None:
    segmentations = _scene(64)
    scores = []
    for side in (64, 16, 8, 4):
        tables = grid_reference(segmentations, (side, side), 3)
        assert tables.sum((1, 2)).tolist() == [64 * 64] * 2
        scores.append(float(mean_best_overlap(tables)[0]))
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0.7


def test_patches_that_do_not_divide_the_image_weigh_pixels_by_area() -> None:
    # Five pixels in two patches: the middle one counts half in each.
    weights = area_weights(5, 2, torch.device("cpu"))
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]]))
    assert area_weights(256, 14, torch.device("cpu")).sum(1).tolist() == pytest.approx([1.0] * 14)


def test_rows_and_columns_of_the_grid_keep_their_places() -> None:
    # A stripe one patch wide survives a grid of 1 x 8, not one of 8 x 1.
    segmentations = torch.zeros(1, 32, 32, dtype=torch.uint8)
    segmentations[:, :, 8:16] = 1
    assert float(mean_best_overlap(grid_reference(segmentations, (1, 8), 2))) > 0.9
    assert float(mean_best_overlap(grid_reference(segmentations, (8, 1), 2))) == 0.25  # all background


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_finds_objects_whose_tokens_differ(name: str) -> None:
    # Patch tokens that are the object's own vector plus a little noise, on a grid of 4 x 8 patches.
    generator = torch.Generator().manual_seed(0)
    patches = torch.zeros(70, 4, 8, dtype=torch.uint8)  # more frames than are clustered at once
    patches[:, :2, 1:4] = 1
    patches[:, 2:, 5:] = 2
    vectors = torch.randn(3, 16, generator=generator)
    tokens = vectors[patches.flatten(1).long()] + 0.01 * torch.randn(70, 32, 16, generator=generator)
    segmentations = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)
    tables = floor_tables(name, tokens, (4, 8), 3, segmentations, 3)
    assert tables.shape[:2] == (70, 3) and (tables.shape[2] == 3 or not name.startswith("kmeans"))
    assert tables.sum((1, 2)).tolist() == [8 * 16] * 70
    assert adjusted_rand_index(tables, foreground=False).min() > 0.9
    assert torch.equal(tables, floor_tables(name, tokens, (4, 8), 3, segmentations, 3))


def test_floors_are_measured_where_they_are_asked_for_and_the_grid_is_not_too_fine() -> None:
    assert floors_asked("usual", (16, 16)) == ["kmeans_raw", "kmeans_whitened", "tfs"]
    assert floors_asked("all", (16, 16)) == [*FLOORS]
    assert floors_asked("all", (200, 200)) == ["kmeans_raw", "kmeans_whitened"]
    assert floor_title("tfs") == "floor: training-free segments"
    assert floor_title("of_another_version") == "floor: of another version"


def test_tables_with_fewer_slots_get_empty_ones() -> None:
    few, more = torch.ones(2, 3, 1, dtype=torch.int64), torch.ones(1, 3, 4, dtype=torch.int64)
    tables = stacked([few, more])
    assert tables.shape == (3, 3, 4) and tables.sum((1, 2)).tolist() == [3, 3, 12]
    scores = Scores()
    scores.add_video(few, 0)
    scores.add_video(more, 1)
    assert torch.equal(scores.frame_tables()[0], tables)
    alone = Scores()
    alone.add_video(few, 0)
    values = torch.stack([torch.stack(list(of.frame_values().values()))[:, :2] for of in (scores, alone)])
    torch.testing.assert_close(values[0], values[1], equal_nan=True)


def test_absent_labels_do_not_change_the_ceiling() -> None:
    segmentations = _scene(64).to(torch.int16)
    segmentations[0, :20, :9] = UNKNOWN
    few, many = (grid_reference(segmentations, (6, 5), count) for count in (3, 40))
    assert torch.equal(many[:, :3, :3], few) and not many[:, 3:].any() and not many[:, :, 3:].any()
    renumbered = torch.where(segmentations == 2, 39, segmentations)
    found = grid_reference(renumbered, (6, 5), 40)
    assert torch.equal(found[:, [0, 1, 39]][:, :, [0, 1, 39]], few)


def test_references_are_kept_beside_the_store_as_long_as_it_holds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store.zarr")
    runs = [tmp_path / f"{slots}-{seed}" for slots, seed in ((3, 0), (3, 1), (4, 0))]
    for run in runs:
        slots, seed = run.name.split("-")
        train(small(f"seed={seed}", model__slots=int(slots), optim__steps=1), store, run)
    measured, measure = [], module._measured

    def counted(split: Split, loaded: LoadedRun, floors: list[str]) -> References:
        measured.append((split.name, loaded.path.name))
        return measure(split, loaded, floors)

    monkeypatch.setattr(module, "_measured", counted)

    def of(run: Path, split: str = "validation", floors: Floors = "usual") -> References:
        here = FeatureStore.open(store.path)
        return references(here[split], load_run(run, here.path), asked=floors)

    first = of(runs[0])
    assert of(runs[1]) == first == of(runs[0]) and measured == [("validation", "3-0")]
    assert evaluate(load_run(runs[1])).references == first and len(measured) == 1, "eval, too"
    assert of(runs[2]).floors["kmeans_raw"] != first.floors["kmeans_raw"], "of as many clusters as a run has slots"
    assert of(runs[0], "train").ceiling != first.ceiling and len(measured) == 3
    assert [*of(runs[1], floors="all").floors] == [*FLOORS] and len(measured) == 4, "more are asked for"
    assert of(runs[0]) == first and len(measured) == 4, "and fewer again"
    with monkeypatch.context() as patch:
        patch.setattr(module, "scoring_code", lambda: "other code")
        assert of(runs[0]) == first and len(measured) == 5
    assert of(runs[0]) == first and len(measured) == 6, "what other code measured is gone"
    kept = store.path / "validation" / "references.json"
    kept.write_text(kept.read_text()[:-9])
    assert of(runs[0]) == first and len(measured) == 7, "nor is a damaged file believed"
    other = make_store(store.path.with_name("other.zarr"), scale=2.0)  # other values, and the file of the first
    shutil.copy(kept, other.path / "validation" / kept.name)
    assert references(other["validation"], load_run(runs[0], other.path)).floors and len(measured) == 8
    shutil.rmtree(other.path / "train")  # whitened by the run's own store then
    assert references(other["validation"], load_run(runs[0], other.path)).floors and len(measured) == 9
    kept.unlink()
    kept.mkdir()  # cannot be written
    assert of(runs[0]) == first and of(runs[0]) == first and len(measured) == 11
