"""A published checkpoint as a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.backbones.backbone import Backbone, outline
from featcache.backbones.origin import Origin
from featcache.backbones.registry import get_spec
from featcache.backbones.registry import input_size as preprocessed_size
from featcache.backbones.taps import vit_of
from featcache.errors import IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from featcache.store.spec import StoreSpec, TapSpec, flatten
from slotlab.config.load import load_config
from slotlab.config.schema import Config
from slotlab.imported.oclf import OCLF
from slotlab.imported.published import Published, read_published
from slotlab.imported.source import Derived, Source, translate
from slotlab.imported.spot import SPOT
from slotlab.imported.videosaur import SLOTCONTRAST, VIDEOSAUR
from slotlab.imported.vits import backbone_of
from slotlab.models.build import empty_model
from slotlab.models.inputs import ModelInput
from slotlab.runs import checkpoint
from slotlab.runs.folder import create_imported
from slotlab.runs.imported import wanted_store

SOURCES: dict[str, Source] = {source.name: source for source in (VIDEOSAUR, SLOTCONTRAST, SPOT, OCLF)}


@dataclass(frozen=True)
class ImportedRun:
    """An imported run, and what was settled without the checkpoint's word."""

    run: Path
    config: Config
    wanted: StoreSpec  # of the store that it can be used on
    origin: dict[str, Any]
    assumed: dict[str, Any]  # dotted key -> value, as in the source's configurations
    extract: str  # the command that makes such a store


def import_run(
    path: Path,
    source: str,
    run: Path,
    *,
    overrides: Iterable[str] = (),
    backbone: str | None = None,
    input_size: tuple[int, int] | None = None,
    cache: Path | None = None,
) -> ImportedRun:
    """Make the run folder of a published checkpoint.

    Args:
        path: the checkpoint, which is read without running code that it may hold.
        source: a name in ``SOURCES``.
        run: the folder to make.
        overrides: settings as ``key=value``, for what the shapes of the tensors do not tell.
        backbone: the backbone that the model was trained on; None: by the shapes of its ViT in the checkpoint.
        input_size: rows and columns in pixels that the backbone saw; None: of a square picture.
        cache: a store to use the run on, from now on.

    Raises:
        UsageError: an unknown source, a setting that is missing or wrong, a run that exists.
        DataError: a checkpoint that cannot be read, or holds code.
        IncompatibleError: a tensor that is missing, unknown or of another shape; a store of other features.
    """
    if source not in SOURCES:
        raise UsageError(f"--from {source}: unknown; there are: {', '.join(SOURCES)}")
    if (run / checkpoint.CONFIG).exists():
        raise UsageError(f"{run}: exists already; choose another --out")
    store = None if cache is None else FeatureStore.open(cache)
    table = SOURCES[source]
    published = read_published(path, table.spelling)
    derived = table.derive(published)
    overrides = list(overrides)
    config = configuration(published, derived, overrides)
    wanted = _wanted(published, table, derived, config, backbone, input_size)
    model = empty_model(config, ModelInput.of(config, FeatureStore(run, wanted)))  # its description: no data is read
    translate(table, published, derived, config, model)

    origin: dict[str, Any] = {"source": source, "repository": table.repository, "checkpoint": str(path.resolve())}
    origin |= {"sha256": published.sha256, "step": published.step, "set": overrides, "backbone": wanted.backbone}
    origin["input_size"] = list(preprocessed_size(wanted.preprocessing))
    create_imported(config, wanted, store, run, model, origin)
    values = flatten(config.model_dump())
    assumed = {key: values[key] for key in derived.assumed if key not in _given(overrides)}
    if published.step is not None:
        assumed.pop("optim.steps", None)
    return ImportedRun(run, config, wanted, origin, assumed, wanted_store(run, wanted)[0])


def configuration(published: Published, derived: Derived, overrides: Sequence[str]) -> Config:
    """The configuration of the checkpoint's model. ``UsageError`` for a setting that is missing or wrong."""
    for key, usual in derived.needed.items():
        if key not in _given(overrides):
            raise UsageError(f"{published.path}: does not tell {key} (published: {usual}); add --set {key}=NUMBER")
    told = {"data.normalize": "none", "model.kind": "slot_attention", "optim.ema": 0.0, **derived.values}
    if published.step is not None:
        told["optim.steps"] = published.step
    return load_config(derived.preset, None, overrides, found=told)


def _given(overrides: Iterable[str]) -> set[str]:
    """The keys of settings."""
    return {override.partition("=")[0].strip() for override in overrides}


def _wanted(
    published: Published,
    source: Source,
    derived: Derived,
    config: Config,
    backbone: str | None,
    input_size: tuple[int, int] | None,
) -> StoreSpec:
    """The store whose features the model reads. ``IncompatibleError`` if the backbone's are of another shape."""
    chosen = backbone or backbone_of(published, source.backbone)
    if chosen is None:
        raise UsageError(
            f"{published.path}: holds no ViT that is known; say on which backbone it was trained with --backbone NAME"
        )
    side = math.isqrt(derived.patches)
    if input_size is None and side**2 != derived.patches:
        raise UsageError(
            f"{published.path}: {derived.patches} patches are of no square picture; add --input-size ROWSxCOLUMNS"
        )
    size = input_size or (side * get_spec(chosen).patch,) * 2
    shape = outline(chosen, config.data.taps, size)
    patches, dim = shape.grid[0] * shape.grid[1], shape.dims[shape.taps[0]]
    if (patches, dim) != (derived.patches, derived.dim):
        raise IncompatibleError(
            f"{published.path}: was trained on {derived.patches} tokens of {derived.dim} channels, and {chosen} gives "
            f"{patches} of {dim} at {size[0]}x{size[1]} px; name the backbone with --backbone, and its input with "
            "--input-size ROWSxCOLUMNS"
        )
    return StoreSpec(
        backbone=shape.spec.name,
        model={key: value for key, value in shape.provenance.items() if not key.startswith("weights_")}
        | _weights(published, shape),
        preprocessing=shape.preprocessing,
        taps={tap: TapSpec(shape.grid, shape.dims[tap]) for tap in shape.taps},
    )


def _weights(published: Published, shape: Backbone) -> dict[str, Any]:
    """Which weights of the backbone the features are of: the published ones, or, of taps that name a ViT of the
    checkpoint, those in it."""
    if not any(map(vit_of, shape.taps)):
        return {"weights_tag": shape.spec.tag}
    origin = Origin("file", str(published.path.resolve()))
    named = {"weights_tag": f"file:{published.path.name}", "weights_sha256": published.sha256}
    return named | {"weights_origin": asdict(origin)}
