"""A frozen backbone and its patch tokens at one or several taps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from featcache.backbones.registry import TAP, BackboneSpec, get_spec, list_backbones
from featcache.backbones.taps import FACETS, Tap, parse_block_tap, parse_tap, vit_of
from featcache.backbones.towers import Tower, open_clip_tower, timm_tower
from featcache.backbones.weights import RANDOM_SEED, Weights, resolve_weights, tensors_sha256
from featcache.errors import IncompatibleError, UsageError

__all__ = ["Backbone", "BackboneSpec", "get_spec", "list_backbones", "load_backbone"]


PIXELS_AT_ONCE = 1 << 25  # of frames that are resized: what that takes must follow from the input, not from the source


class Backbone:
    """A frozen model, its taps and its preprocessing. Made by `load_backbone`.

    Taps of several ViTs in one file of weights have a tower each.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        towers: Mapping[str, Tower],
        taps: tuple[Tap, ...],
        input_size: tuple[int, int],
        weights: Weights,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.input_size = input_size
        self.device = device
        self.taps = tuple(tap.name for tap in taps)
        self._taps = taps
        self._towers = towers  # by what the taps call their ViT
        self.dims: dict[str, int] = {}
        strides = {}
        for tap in taps:
            tower = towers[tap.vit]
            info = {} if tower.blocks else tower.model.feature_info[tap.index]
            strides[tap.name] = int(info.get("reduction", spec.patch))
            self.dims[tap.name] = int(info.get("num_chs", spec.dim))
        if len(set(strides.values())) > 1:
            listed = ", ".join(f"{name} every {stride} px" for name, stride in strides.items())
            raise UsageError(f"taps of one store share one grid, but these differ: {listed}")
        self.patch = next(iter(strides.values()))
        _check_input_size(spec.name, input_size, self.patch)
        self.grid = (input_size[0] // self.patch, input_size[1] // self.patch)
        self.preprocessing: dict[str, Any] = {
            "size": input_size[0] if input_size[0] == input_size[1] else list(input_size),
            "resize": "whole frame",
            "interpolation": spec.interpolation,
            "antialias": True,
            "mean": list(spec.mean),
            "std": list(spec.std),
        }
        self.provenance: dict[str, Any] = {
            "backbone": spec.name,
            "library": spec.library,
            "library_version": version({"timm": "timm", "open_clip": "open_clip_torch"}[spec.library]),
            "model_id": spec.model_id,
            "weights_tag": weights.tag,
            "weights_origin": dataclasses.asdict(weights.origin),
            "weights_sha256": weights.sha256,
            "prefix_tokens_dropped": spec.prefix_tokens,
            "position_antialias": spec.position_antialias,
            "patch": self.patch,
            "grid": list(self.grid),
        }
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self._scale = (1 / (255 * std)).view(3, 1, 1).to(device)
        self._shift = (-mean / std).view(3, 1, 1).to(device)

    @contextmanager
    def emptied(self, device: torch.device) -> Iterator[None]:
        """Within the context the backbone is on that device, with weights that have no values."""
        models = [tower.model for tower in self._towers.values()]
        was = self.device, [(m, dict(m._parameters), dict(m._buffers)) for model in models for m in model.modules()]
        for model in models:
            model.to_empty(device=device)
        self.device = device
        try:
            yield
        finally:
            self.device, held = was
            for module, parameters, buffers in held:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def preprocess(self, frames: Tensor) -> Tensor:
        """Bring uint8 frames (B, H, W, 3) of any size to the model's input, float32 (B, 3, rows, columns).

        The whole frame is resized, never cropped, so that masks and tokens cover the same picture. A frame of other
        proportions than the input is squeezed. ``UsageError`` for frames of another shape or type.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UsageError(f"frames must be uint8 (B, H, W, 3), not {frames.dtype} {tuple(frames.shape)}")
        few = max(1, PIXELS_AT_ONCE // (frames.shape[1] * frames.shape[2]))
        return torch.cat([self._prepared(part) for part in torch.split(frames, few)])

    def _prepared(self, frames: Tensor) -> Tensor:
        images: Tensor = frames.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W)
        mode = InterpolationMode(self.spec.interpolation)
        images = resize(images, list(self.input_size), interpolation=mode, antialias=True)
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Patch tokens (B, N, D) of each tap, patches row by row, for preprocessed images (B, 3, rows, columns).

        One pass of each ViT, which ends with the last block needed. Prefix tokens (class, registers) are dropped.
        """
        rows, columns = self.input_size
        if images.shape[1:] != (3, rows, columns):
            raise UsageError(f"images must be (B, 3, {rows}, {columns}) from preprocess, not {tuple(images.shape)}")
        tokens: dict[str, Tensor] = {}
        for vit, tower in self._towers.items():
            tokens |= self._passed(images, tower, [tap for tap in self._taps if tap.vit == vit])
        expected = self.grid[0] * self.grid[1]
        for name, value in tokens.items():  # models by timm: or open_clip: names may break the rules
            if value.shape[1] != expected:
                found = value.shape[1]
                raise IncompatibleError(f"{self.spec.name} gave {found} tokens at {name}, not {expected}")
        return {tap: tokens[tap] for tap in self.taps}

    def _passed(self, images: Tensor, tower: Tower, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Tokens of the taps of one tower."""
        inputs = {}

        def keep(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs[index] = args[0]  # (B, P + N, D), the input of the attention

            return hook

        faceted = {tap.index for tap in taps if tap.kind in FACETS}
        handles = [_attention(tower.blocks[i]).register_forward_pre_hook(keep(i)) for i in sorted(faceted)]
        indices = sorted({tap.index for tap in taps})
        try:
            outputs = dict(zip(indices, tower.intermediates(images, indices), strict=True))
        finally:
            for handle in handles:
                handle.remove()
        tokens = {}
        for tap in taps:
            if tap.kind in FACETS:
                projected = _project(_attention(tower.blocks[tap.index]), tap.kind, inputs[tap.index])
                tokens[tap.name] = projected[:, self.spec.prefix_tokens :]
            elif tap.kind == "norm":
                assert tower.norm is not None  # parse_tap checks it
                tokens[tap.name] = tower.norm(outputs[tap.index])
            else:
                tokens[tap.name] = outputs[tap.index]
        return tokens


def load_backbone(
    name: str,
    weights: str | None = None,
    taps: Sequence[str] = (),
    input_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> Backbone:
    """Build a backbone ready to run.

    Args:
        name: a name for `get_spec`.
        weights: a value for `featcache.backbones.weights.resolve_weights`.
        taps: names of the taps; none: the last block's output, before the final norm.
        input_size: pixels a side, or rows and columns; position embeddings are resampled to it.
        device: device of the model and its inputs.

    Raises:
        UsageError: unknown name or tap, a size that the patch does not divide, taps of different grids.
        DataError: weights that cannot be found or read.
        IncompatibleError: a checkpoint of another model.
    """
    spec, size, wanted = _settle(name, taps, input_size)
    found, target = resolve_weights(spec, weights), torch.device(device)
    towers = _towers(spec, size, found, wanted)
    if found.state_dict is None:
        found = dataclasses.replace(found, sha256=tensors_sha256(next(iter(towers.values())).model.state_dict()))
    for tower in towers.values():
        tower.model.to(target)
    parsed = tuple(parse_tap(tap, spec, towers[vit_of(tap)]) for tap in wanted)
    return Backbone(spec, towers, parsed, size, dataclasses.replace(found, state_dict=None), target)


def outline(name: str, taps: Sequence[str] = (), input_size: int | tuple[int, int] | None = None) -> Backbone:
    """A backbone on torch's meta device, where tensors have shapes and no values; arguments as for `load_backbone`."""
    spec, size, wanted = _settle(name, taps, input_size)
    weights = resolve_weights(spec, "random")
    with torch.device("meta"):
        towers = _towers(spec, size, weights, wanted)
        parsed = tuple(parse_tap(tap, spec, towers[vit_of(tap)]) for tap in wanted)
        return Backbone(spec, towers, parsed, size, weights, torch.device("meta"))


def _settle(
    name: str, taps: Sequence[str], input_size: int | tuple[int, int] | None
) -> tuple[BackboneSpec, tuple[int, int], tuple[str, ...]]:
    """The backbone, rows and columns of its input, and the taps wanted; `UsageError` where they do not fit."""
    spec = get_spec(name)
    wished = spec.default_size if input_size is None else input_size
    size = (wished, wished) if isinstance(wished, int) else wished
    wanted = tuple(dict.fromkeys(taps)) or (spec.default_tap,)
    if TAP.fullmatch(spec.default_tap):
        _check_input_size(spec.name, size, spec.patch)
        for tap in wanted:  # before a download that takes minutes
            parse_block_tap(tap, spec)
    return spec, size, wanted


def _towers(spec: BackboneSpec, size: tuple[int, int], weights: Weights, taps: Sequence[str]) -> dict[str, Tower]:
    """The tower of each ViT that taps are of."""
    build = open_clip_tower if spec.library == "open_clip" else timm_tower
    vits, towers = TAP.fullmatch(spec.default_tap) is not None, {}
    for name in dict.fromkeys(map(vit_of, taps)):
        # The library's initialiser draws from the global generator: leave the caller's as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            towers[name] = build(spec, size, weights.of_vit(name) if vits else weights)
        towers[name].model.eval().requires_grad_(False)
    return towers


def _check_input_size(name: str, size: tuple[int, int], patch: int) -> None:
    for side in size:
        if side < patch or side % patch:
            below = side // patch * patch
            nearest = f"{below} and {below + patch}" if below else f"{patch}"
            raise UsageError(f"input size {side} is no multiple of the patch of {name}, {patch} px; nearest: {nearest}")


def _attention(block: nn.Module) -> nn.Module:
    attention = block.attn
    assert isinstance(attention, nn.Module)
    return attention


def _project(attention: Any, facet: str, x: Tensor) -> Tensor:
    """One of the three projections (B, L, D) of an attention's input ``x`` (B, L, D).

    It is computed again, not hooked: several families (Eva, BEiT, `nn.MultiheadAttention`) call fused layers as
    functions, where a hook never fires, and one third of one layer costs little.
    """
    part = FACETS.index(facet)
    weight = getattr(attention, "in_proj_weight", None)
    bias = getattr(attention, "in_proj_bias", None)
    if weight is None and getattr(attention, "qkv", None) is not None:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # Eva and BEiT keep the biases apart
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    if weight is None:
        return F.linear(x, *(_linear(attention, f"{facet[0]}_proj")))
    return F.linear(x, weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part])


def _linear(attention: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    layer = getattr(attention, name, None)
    if not isinstance(layer, nn.Linear):
        raise UsageError(f"{type(attention).__name__} has no query, key and value projections to tap")
    return layer.weight, layer.bias
