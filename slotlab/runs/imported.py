"""The store that a run wants which was not trained here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from featcache.backbones.origin import Origin
from featcache.backbones.registry import input_size
from featcache.extraction.command import extract_command
from featcache.extraction.fit import fit_of
from featcache.store.reading import FeatureStore
from featcache.store.spec import StoreSpec

DATA = "VIDEOS"  # stands for a folder that only the user knows


def wanted_store(run: Path, wanted: StoreSpec, instead_of: FeatureStore | None = None) -> tuple[str, Path]:
    """The command that extracts what a run wants, and the store that it makes: of the videos of another store, with its
    frames and masks, or else of a folder that the user names."""
    origin = Origin.read(wanted.model.get("weights_origin"))
    named = partial(
        extract_command,
        backbone=wanted.backbone,
        taps=wanted.taps,
        input_size=input_size(wanted.preprocessing),
        weights=origin.weights if origin else "",
    )
    if instead_of is None:
        out = Path("cache") / f"{run.resolve().name}.zarr"
        return named(source=DATA, out=out), out
    spec, out = instead_of.spec, instead_of.path.with_name(f"{instead_of.path.stem}-{run.resolve().name}.zarr")
    frames = instead_of[instead_of.splits[0]].spec.frame_size if instead_of.splits else ()
    command = named(
        source=spec.source or DATA,
        out=out,
        fit="" if fit_of(spec.preprocessing) == "squash" else fit_of(spec.preprocessing),
        frame_size="x".join(map(str, frames)),
        dtype=spec.dtype,
    )
    return command, out
