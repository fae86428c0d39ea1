"""Loads the backbone of a store again, to repair the store or to compute features of other frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import forward
from featcache.backbones.origin import Origin
from featcache.backbones.registry import input_size
from featcache.errors import DataError, IncompatibleError, compare_settings
from featcache.extraction.fit import fit_of, fitting
from featcache.store.reading import FeatureStore
from featcache.store.spec import StoreSpec, TapSpec, taps_of


def store_backbone(
    store: FeatureStore, taps: Sequence[str] = (), weights: str | None = None, device: str = "cpu"
) -> Backbone:
    """The backbone named in a store, for some of its taps or all.

    ``weights`` are as for `featcache.backbones.backbone.load_backbone`; None: the origin that the store records. Raises
    `DataError` if they are gone, `UsageError` for a backbone that this version does not know, and `IncompatibleError`
    if the backbone differs from the one that made the store.
    """
    spec = store.spec
    if "size" not in spec.preprocessing:
        raise DataError(
            f"{store.path}: was imported, so the backbone that made it is not known; extract a store instead"
        )
    chosen = tuple(taps) or tuple(spec.taps)
    weights = weights or recorded_weights(spec)
    backbone = load_backbone(spec.backbone, weights, chosen, input_size(spec.preprocessing), device)
    refuse_other_backbone(store, backbone, chosen)
    return backbone


def token_maker(
    store: FeatureStore, tap: str, weights: str | None, device: torch.device
) -> Callable[[npt.NDArray[np.uint8]], torch.Tensor]:
    """A function from frames (T, H, W, 3) uint8 to tokens (T, N, D) on the device, computed like the store's tokens.

    ``tap`` may be several, ``A+B``, whose channels follow each other. ``weights`` and errors are those of
    :func:`store_backbone`.
    """
    spec, backbone = store.spec, store_backbone(store, taps_of(tap), weights, str(device))
    # Half precision is emulated on a CPU; what a GPU rounded is within 1 % of the exact features.
    precision = "float32" if device.type == "cpu" and spec.precision == "float16" else spec.precision

    def tokens(frames: npt.NDArray[np.uint8]) -> torch.Tensor:
        found = forward(backbone, [frames], max(spec.batch_size, 1), precision)[0]
        return torch.cat([store.encoding.rounded(found[tap]) for tap in taps_of(tap)], -1)

    return tokens


def refuse_other_backbone(store: FeatureStore, backbone: Backbone, taps: Sequence[str] = ()) -> None:
    """``IncompatibleError`` unless the backbone gives the store's features at these taps (default: at all)."""
    spec = store.spec
    made = replace(
        spec,
        model=backbone.provenance,
        preprocessing={**backbone.preprocessing, **fitting(fit_of(spec.preprocessing), backbone.spec.mean)},
        taps={tap: TapSpec(backbone.grid, backbone.dims[tap]) for tap in backbone.taps},
    )
    kept = _deciding(replace(spec, taps={tap: spec.taps[tap] for tap in taps or spec.taps}))
    now = {key: value for key, value in _deciding(made).items() if key in kept or key != "model.weights_sha256"}
    if differences := compare_settings(kept, now):  # a specification that no extraction made names no file of weights
        raise IncompatibleError(
            f"{store.path}: made with another backbone",
            differences,
            "name the weights that it was made with by --weights",
        )


def _deciding(spec: StoreSpec) -> dict[str, Any]:
    """The settings that decide the features, without the name that the weights had where they came from."""
    return {key: value for key, value in spec.identity().items() if key != "model.weights_tag"}


def recorded_weights(spec: StoreSpec) -> str | None:
    """The ``--weights`` value that reproduces a store's recorded weights; None if it records none.

    ``DataError`` if the recorded file is gone.
    """
    origin = Origin.read(spec.model.get("weights_origin"))
    if origin is None:
        return None
    if origin.kind == "file" and not Path(origin.place).exists():
        raise DataError(f"{origin.place}: the weights that the store was made with are gone; name them with --weights")
    return origin.weights
