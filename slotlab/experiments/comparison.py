"""Plans a comparison of backbones on one patch grid: the stores it needs, and the runs on them.

A score depends on the grid of patches more than on the backbone (a 14x14 grid's ceiling is 0.71 FG-ARI, a 16x16
grid's 0.79), so each backbone gets frames of the size that makes the grids equal: 224 px for a patch of 14,
256 px for a patch of 16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.backbones.registry import BackboneSpec, get_spec
from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.sources import Reading, open_source
from featcache.sources.video import Source
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.experiments.plan import PLAN, Cell, Plan, cell_name, read_plan, split_to_score

if TYPE_CHECKING:  # model libraries take seconds to import, and are not needed if the stores exist
    import torch

    from featcache.backbones.backbone import Backbone
    from featcache.extraction.extract import Progress


@dataclass(frozen=True)
class Settings:
    """The subject of a comparison. Taps apply to every backbone; none means each one's last block."""

    backbones: tuple[str, ...]
    taps: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("default",)
    seeds: tuple[int, ...] = (0, 1, 2)
    config: Path | None = None  # TOML file, laid over each preset
    overrides: tuple[str, ...] = ()
    steps: int | None = None
    data: str | None = None
    reading: Reading | None = None
    split: str | None = None  # split to score
    weights: tuple[str, ...] = ()  # BACKBONE=FILE, or one value for all
    grid: int = 16  # patches a side
    max_videos: int | None = None  # at most, of each split


@dataclass(frozen=True)
class StoreRequest:
    """A store that the comparison needs: one backbone, with all taps and both splits."""

    spec: BackboneSpec
    taps: tuple[str, ...]
    weights: str | None
    grid: int
    splits: tuple[str, ...]
    max_videos: int | None
    folder: Path
    settled: Path | None  # store that an earlier start of this comparison chose

    @property
    def path(self) -> Path:
        """The store to extract to if no existing one fits."""
        words = [
            self.spec.name,
            f"{self.grid}x{self.grid}",
            *(tap for tap in self.taps if tap != self.spec.default_tap),
        ]
        if self.weights == "random":
            words.append("random")
        return self.settled or self.folder / f"{cell_name(['-'.join(words)])}.zarr"

    def load(self, device: str | torch.device) -> Backbone:
        """Load the backbone with the input size that gives the grid."""
        from featcache.backbones.backbone import load_backbone

        size = self.grid * self.spec.patch
        backbone = load_backbone(self.spec.name, self.weights, self.taps, size, device)
        if backbone.grid != (self.grid, self.grid):  # the tap's stride differs from the default tap's
            backbone = load_backbone(self.spec.name, self.weights, self.taps, self.grid * backbone.patch, device)
        return backbone

    def find(self, source: Source) -> Path | None:
        """A finished store that holds everything needed, with the fewest other taps; None if there is none."""
        candidates = [self.path, *sorted(self.folder.glob("*.zarr"))] if self.settled is None else [self.path]
        fitting = [store for path in candidates if (store := self._fits(path, source)) is not None]
        return min(fitting, key=lambda store: len(store.spec.taps)).path if fitting else None

    def lacking(self) -> list[str]:
        """The taps that are missing in the store of an earlier start."""
        if self.settled is None or not (self.settled / "zarr.json").exists():
            return []
        return [tap for tap in self.taps if tap not in FeatureStore.open(self.settled).spec.taps]

    def _fits(self, path: Path, source: Source) -> FeatureStore | None:
        try:
            store = FeatureStore.open(path)
            spec = store.spec
            if (
                spec.backbone == self.spec.name
                and spec.frame_stride == 1
                and all(tap in spec.taps and spec.taps[tap].grid == (self.grid, self.grid) for tap in self.taps)
                and self._has_weights(store)
                and all(name in store.splits and self._holds(store, name, source) for name in self.splits)
            ):
                return store
        except (DataError, IncompatibleError):  # unfinished, damaged, of another version
            pass
        return None

    def _holds(self, store: FeatureStore, name: str, source: Source) -> bool:
        split = store[name]
        videos = len(source.lengths(name)[: self.max_videos])
        if not split.complete or len(split.videos) != videos:
            return False
        if split.spec.fingerprints:  # in whichever order they came
            return sorted(split.spec.fingerprints) == sorted(source.fingerprints(name)[:videos])
        return split.spec.source_fingerprint == source.fingerprint(name)

    def _has_weights(self, store: FeatureStore) -> bool:
        if self.weights in (None, "wheel", "hub"):
            return bool(store.spec.model["weights_tag"] == self.spec.tag)
        if self.weights == "random":
            return bool(store.spec.model["weights_tag"] == "random")
        with Path(self.weights or "").open("rb") as file:
            return bool(store.spec.model["weights_sha256"] == hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Comparison:
    """The plan of a comparison, its source, and the stores that are still missing."""

    plan: Plan
    source: Source
    missing: tuple[StoreRequest, ...]

    def extract(self, device: str | torch.device, progress: Progress) -> None:
        """Extract the missing stores, and resume unfinished ones. ``progress`` gets store and split as one name."""
        from featcache.extraction.extract import extract
        from featcache.extraction.plan import ExtractOptions, plan

        for request in self.missing:
            backbone, name = request.load(device), request.path.stem
            options = ExtractOptions(splits=request.splits, max_videos=request.max_videos)

            def show(split: str, done: int, total: int, name: str = name) -> None:
                progress(f"{name} {split}", done, total)

            todo = plan(request.path, self.source, backbone, options)
            if any(split.changes.new or split.changes.vanished for split in todo.splits):
                raise IncompatibleError(
                    f"{request.path}: holds other videos than {self.source.location} does now; delete it and run the "
                    "same command again, which extracts them"
                )
            extract(todo, self.source, backbone, show)


def plan_comparison(settings: Settings, out: Path, cache_folder: Path) -> Comparison:
    """Decide what to train and which stores are missing, without writing anything.

    This checks every name, key, tap, size and file of weights before an extraction takes hours. Raises
    ``UsageError``, ``DataError`` or ``IncompatibleError``.
    """
    configs = {preset: _config(settings, preset) for preset in dict.fromkeys(settings.presets)}
    if predicting := [preset for preset, config in configs.items() if config.model.scored_by == "rollout"]:
        raise UsageError(
            f"--preset {predicting[0]}: predicts what a run's slots do; compare such models with slotlab ablate FILE, "
            "where cache = RUN/tracks.zarr names the slots and may vary"
        )
    specs = {spec.name: spec for spec in map(get_spec, settings.backbones)}
    if not specs:
        raise UsageError("nothing to compare; name a --backbone")
    source = open_source(settings.data, settings.reading)
    if settings.split is None:
        settings = replace(settings, split=split_to_score(next(iter(configs.values())), source.splits()))
        configs = {preset: _config(settings, preset) for preset in configs}
    data = [config.data for config in configs.values()]
    splits = tuple(dict.fromkeys([*(d.train_split for d in data), *(d.eval_split for d in data)]))
    for name in splits:
        if name not in source.splits():
            known = ", ".join(source.splits())
            raise UsageError(f"{source.location}: no split {name!r}; it has: {known}; choose one to score with --split")
        if any(d.eval_split == name for d in data) and source.read(name, 0).segmentations is None:
            raise DataError(f"{source.location}: {name} has no masks, so there is nothing to score against")
    weights = _weights(settings.weights, specs)
    settled = {}
    if (out / PLAN).exists():
        settled = {cell.settings.get("backbone"): Path(cell.cache) for cell in read_plan(out).cells}
    requests = [
        StoreRequest(
            spec,
            tuple(dict.fromkeys(settings.taps)) or (spec.default_tap,),
            weights.get(name),
            settings.grid,
            splits,
            settings.max_videos,
            cache_folder,
            settled.get(name),
        )
        for name, spec in specs.items()
    ]
    stores = [request.find(source) for request in requests]
    for request in requests:
        if lacking := request.lacking():
            raise UsageError(
                f"--tap {lacking[0]}: missing in {request.settled}, the store of {request.spec.name} that the "
                f"comparison in {out} uses; choose another --out for a comparison with this tap"
            )
    missing = tuple(request for request, store in zip(requests, stores, strict=True) if store is None)
    for request in missing:
        backbone = request.load("cpu")
        if backbone.grid != (request.grid, request.grid):
            raise UsageError(f"{request.spec.name}: no input size gives a grid of {request.grid}x{request.grid}")
    paths = [store or request.path for request, store in zip(requests, stores, strict=True)]
    cells = tuple(_cells(settings, configs, requests, paths))
    made_of = {
        "data": source.location,
        "fingerprint": {name: source.fingerprint(name) for name in splits},
        "grid": settings.grid,
        "max_videos": settings.max_videos,
        "weights": {name: weights.get(name) for name in specs},
    }
    return Comparison(Plan("compare", data[0].eval_split, settings.seeds, cells, made_of), source, missing)


def _cells(
    settings: Settings, configs: dict[str, Config], requests: Sequence[StoreRequest], paths: Sequence[Path]
) -> Iterator[Cell]:
    for preset, config in configs.items():
        if config.model.kind == "pixel":
            # All stores of one source hold the same frames, so a model of pixels is trained once.
            yield Cell(
                cell_name([preset]), {"backbone": None, "tap": config.data.tap, "preset": preset}, str(paths[0]), config
            )
            continue
        for request, path in zip(requests, paths, strict=True):
            for tap in request.taps:
                name = cell_name(["-".join((request.spec.name, tap, preset))])
                what = {"backbone": request.spec.name, "tap": tap, "preset": preset}
                yield Cell(name, what, str(path), _config(settings, preset, tap))


def _config(settings: Settings, preset: str, tap: str | None = None) -> Config:
    for text in settings.overrides:
        key = text.partition("=")[0].strip()
        if key in ("seed", "data.tap", "data.eval_split"):
            option = {"seed": "--seeds", "data.tap": "--tap", "data.eval_split": "--split"}[key]
            raise UsageError(f"--set {text}: is what a comparison varies or shares; use {option}")
    return load_config(
        preset,
        settings.config,
        settings.overrides,
        data__tap=tap,
        data__eval_split=settings.split,
        optim__steps=settings.steps,
    )


def _weights(given: Sequence[str], specs: dict[str, BackboneSpec]) -> dict[str, str]:
    """Weights by backbone, from values ``BACKBONE=FILE`` or one value for all backbones."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            found = dict.fromkeys(specs, text) | found
            continue
        canonical = get_spec(name).name
        if canonical not in specs:
            raise UsageError(f"--weights {text}: {canonical} is not compared; add --backbone {name}")
        found[canonical] = value
    for value in found.values():
        if value not in ("random", "wheel", "hub") and not Path(value).is_file():
            raise DataError(f"--weights {value}: no such file (also understood: random, wheel, hub)")
    return found
