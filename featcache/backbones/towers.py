"""The networks of timm and open_clip behind one interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from featcache.backbones.registry import TAP, BackboneSpec, is_plain_vit
from featcache.backbones.weights import Weights
from featcache.errors import IncompatibleError

# Names of parameters that patch tokens do not depend on.
UNUSED = ("head", "fc.", "fc_norm.", "attn_pool.", "mask_token", "decoder_", "proj", "norm_head", "ln_post_")


@dataclass(frozen=True)
class Tower:
    """The parts of a model that taps use, whichever library built it."""

    model: Any  # an nn.Module; the libraries' attributes are not typed
    intermediates: Callable[[Tensor, list[int]], Sequence[Tensor]]
    blocks: Sequence[nn.Module] = ()  # empty for a convolutional network
    norm: nn.Module | None = None


def timm_tower(spec: BackboneSpec, size: tuple[int, int], weights: Weights) -> Tower:
    """The tower of a timm model with input ``size`` (rows, columns). `IncompatibleError` if the weights do not fit."""
    import timm

    plain = TAP.fullmatch(spec.default_tap) is not None
    try:
        model: Any = timm.create_model(spec.model_id, num_classes=0, img_size=size)
    except TypeError:
        if plain:
            raise
        model = timm.create_model(spec.model_id, num_classes=0)  # convolutional networks take any size
    if weights.state_dict is not None:
        _fit(model, _converted(model, weights, spec), spec, weights)

    def stages(images: Tensor, indices: list[int]) -> list[Tensor]:
        maps = model.forward_intermediates(
            images, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return [stage.flatten(2).transpose(1, 2) for stage in maps]  # (B, C, h, w) -> (B, h * w, C)

    def tokens(images: Tensor, indices: list[int]) -> list[Tensor]:
        # norm=False: the final norm acts on each token alone, and is applied later to the taps that include it
        found: list[Tensor] = model.forward_intermediates(
            images, indices=indices, norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return found

    if not plain:
        return Tower(model, stages)
    assert is_plain_vit(model)
    return Tower(model, tokens, list(model.blocks), _norm(model.norm, spec))


def _converted(model: nn.Module, weights: Weights, spec: BackboneSpec) -> Mapping[str, Tensor]:
    """The checkpoint with timm's names and the model's grid, by timm's converter for that family."""
    state = weights.state_dict or {}
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    if convert is None:
        return state
    resamples = "antialias" in inspect.signature(convert).parameters
    options = {"antialias": spec.position_antialias} if resamples else {}
    try:
        converted: dict[str, Tensor] = convert(dict(state), model, **options)
    except Exception:  # it fails on another model's checkpoint in many ways; `_fit` reports the differences
        return state
    return converted


def open_clip_tower(spec: BackboneSpec, size: tuple[int, int], weights: Weights) -> Tower:
    """The image tower of an open_clip model; arguments and errors as for :func:`timm_tower`."""
    import open_clip
    from open_clip.model import _build_vision_tower, resize_pos_embed

    config = open_clip.get_model_config(spec.model_id)
    # The image tower only: `create_model` would also build the text tower, and warn that it is untrained.
    visual: Any = _build_vision_tower(
        config["embed_dim"], {**config["vision_cfg"], "image_size": size}, bool(config.get("quick_gelu"))
    )
    if weights.state_dict is not None:
        state = {k: v for k, v in weights.state_dict.items() if k.startswith("visual.")}
        resize_pos_embed(state, SimpleNamespace(visual=visual), antialias=spec.position_antialias)
        _fit(visual, {k.removeprefix("visual."): v for k, v in state.items()}, spec, weights)

    def tokens(images: Tensor, indices: list[int]) -> list[Tensor]:
        found: list[Tensor] = visual.forward_intermediates(
            images, indices=indices, stop_early=True, output_fmt="NLC", intermediates_only=True
        )["image_intermediates"]
        return found

    return Tower(visual, tokens, list(visual.transformer.resblocks), _norm(visual.ln_post, spec))


def _norm(module: nn.Module, spec: BackboneSpec) -> nn.Module | None:
    """The final norm, if it acts on tokens; None for models that pool first."""
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.shape == (spec.dim,) else None


def _fit(model: nn.Module, state: Mapping[str, Tensor], spec: BackboneSpec, weights: Weights) -> None:
    """Load ``state``. `IncompatibleError` if it lacks parameters that tokens depend on, or has other ones."""
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(UNUSED)]
    unexpected = [k for k in state if k not in own and not k.startswith(UNUSED)]
    shapes = [k for k in own if k in state and state[k].shape != own[k].shape and not k.startswith(UNUSED)]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise IncompatibleError(
            f"{weights.origin} does not fit {spec.name} ({spec.library} {spec.model_id}): {'; '.join(parts)}"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)
