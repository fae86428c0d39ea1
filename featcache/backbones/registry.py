"""The registry of backbones: short names, aliases, and the names of the two libraries.

The registry imports neither torch nor a model library, except for ``timm:`` and ``open_clip:`` names, which it looks up
in the library.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from featcache.errors import UsageError

Library = Literal["timm", "open_clip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# The ViT within a file of weights, a block, and what is read there; see featcache.backbones.taps.
TAP = re.compile(r"(?:(?P<vit>[\w.]+)\.)?block(?P<block>[1-9]\d*)(?:\.(?P<kind>\w+))?")


@dataclass(frozen=True)
class BackboneSpec:
    """A frozen image model and the input that it expects.

    ``patch`` is the side of a token's cell in pixels, and ``dim`` the width of a token, both at the default tap;
    ``depth`` is the number of blocks (stages in a convolutional network).
    """

    name: str
    library: Library
    model_id: str
    tag: str  # name of the weights for that architecture
    patch: int
    dim: int
    depth: int
    prefix_tokens: int
    source: str  # address to download the weights from
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    native_size: int = 224  # pixels a side in pre-training
    default_size: int = 224
    interpolation: str = "bicubic"
    default_tap: str = "block12"
    # DINOv2 without registers shrinks its position embedding without antialiasing (facebookresearch/dinov2,
    # hubconf); with antialiasing the tokens at 224 px are 4 % off those of the original.
    position_antialias: bool = True


def _timm(name: str, model_id: str, patch: int, dim: int, prefix: int, url: str = "", **more: Any) -> BackboneSpec:
    hub = f"https://huggingface.co/timm/{more.pop('hub', model_id)} (model.safetensors)"
    return BackboneSpec(
        name=name,
        library="timm",
        model_id=model_id,
        tag=model_id.partition(".")[2],
        patch=patch,
        dim=dim,
        depth=more.pop("depth", 12),
        prefix_tokens=prefix,
        source=f"{url} or {hub}" if url else hub,
        **more,
    )


_META = "https://dl.fbaipublicfiles.com"
_DINOV2 = {"native_size": 518}
# fmt: off
_SPECS = (
    _timm(
        "dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", 14, 384, 1,
        f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", position_antialias=False, **_DINOV2,
    ),
    _timm(
        "dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 14, 768, 1,
        f"{_META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", position_antialias=False, **_DINOV2,
    ),
    _timm(
        "dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 14, 384, 5,
        f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", **_DINOV2,
    ),
    _timm(
        "dino_vits16", "vit_small_patch16_224.dino", 16, 384, 1,
        f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ),
    _timm(
        "dino_vitb16", "vit_base_patch16_224.dino", 16, 768, 1,
        f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    # OpenAI trained with QuickGELU; the plain architecture loads the same file, but computes other features.
    _timm(
        "clip_vitb16", "vit_base_patch16_clip_quickgelu_224.openai", 16, 768, 1,
        hub="vit_base_patch16_clip_224.openai", mean=CLIP_MEAN, std=CLIP_STD,
    ),
    _timm("dinov3_vits16", "vit_small_patch16_dinov3.lvd1689m", 16, 384, 5, native_size=256),
    _timm(
        "mae_vitb16", "vit_base_patch16_224.mae", 16, 768, 1,
        f"{_META}/mae/pretrain/mae_pretrain_vit_base.pth",
    ),
    _timm("siglip2_vitb16", "vit_base_patch16_siglip_224.v2_webli", 16, 768, 0, mean=HALF, std=HALF),
    # Stride 16 by default: layer4's grid of 7 x 7 at 224 px is too coarse for objects.
    _timm("resnet18", "resnet18.a1_in1k", 16, 256, 0, depth=4, default_tap="layer3"),
)
# fmt: on
_BY_NAME = {spec.name: spec for spec in _SPECS}
ALIASES = {"dinov2": "dinov2_vits14", "dino": "dino_vits16", "clip": "clip_vitb16"}


def list_backbones() -> tuple[BackboneSpec, ...]:
    """Every backbone with a short name, in the order of display."""
    return _SPECS


def get_spec(name: str) -> BackboneSpec:
    """Look up a short name, an alias, ``timm:NAME`` or ``open_clip:ARCH/TAG``; `UsageError` if unknown."""
    if name.startswith("timm:"):
        return _timm_spec(name)
    if name.startswith("open_clip:"):
        return _open_clip_spec(name)
    spec = _BY_NAME.get(ALIASES.get(name, name))
    if spec is not None:
        return spec
    known = [*_BY_NAME, *ALIASES]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)},"
    raise UsageError(f"unknown backbone {name!r}; {hint} (timm:NAME and open_clip:ARCH/TAG work too)")


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _default_size(native: int, patch: int) -> int:
    return 224 if native % patch == 0 and 224 % patch == 0 else native


def _timm_spec(name: str) -> BackboneSpec:
    import timm
    import torch

    model_id = name.removeprefix("timm:")
    architecture, _, tag = model_id.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {architecture!r}{_close(architecture, timm.list_models())}")
    known = {m.partition(".")[2] for m in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in known:
        raise UsageError(f"timm has no weights {tag!r} for {architecture}; known: {', '.join(sorted(known))}")
    config: Any = timm.get_pretrained_cfg(model_id)
    with torch.device("meta"):
        model: Any = timm.create_model(model_id, num_classes=0)
    native = int(config.input_size[-1])
    if is_plain_vit(model):
        patch = int(model.patch_embed.patch_size[0])
        dim, depth, prefix = model.embed_dim, len(model.blocks), model.num_prefix_tokens
        tap = f"block{depth}"
    elif hasattr(model, "forward_intermediates") and hasattr(model, "feature_info"):
        last = model.feature_info[-1]
        patch, dim, tap = last["reduction"], last["num_chs"], last["module"]
        depth, prefix = len(model.feature_info), 0
    else:
        raise UsageError(f"timm's {architecture} gives no intermediate features; choose another model")
    return BackboneSpec(
        name=name,
        library="timm",
        model_id=model_id,
        tag=tag or str(config.tag or ""),
        patch=patch,
        dim=dim,
        depth=depth,
        prefix_tokens=prefix,
        source=f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else (config.url or model_id),
        mean=tuple(config.mean),
        std=tuple(config.std),
        native_size=native,
        default_size=_default_size(native, patch),
        interpolation=config.interpolation,
        default_tap=tap,
        position_antialias=not ("dinov2" in architecture and prefix == 1),
    )


def is_plain_vit(model: Any) -> bool:
    """True for the families of timm that keep one token grid through a list of blocks (ViT, Eva, BEiT)."""
    embed = getattr(model, "patch_embed", None)
    return hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens") and hasattr(embed, "patch_size")


def _open_clip_spec(name: str) -> BackboneSpec:
    import open_clip

    architecture, _, tag = name.removeprefix("open_clip:").partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = _close(architecture, open_clip.list_models())
        raise UsageError(f"open_clip has no architecture {architecture!r}{close}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise UsageError(f"name weights by open_clip:{architecture}/TAG, one of {', '.join(tags) or '(none)'}")
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        raise UsageError(f"open_clip's {architecture} is timm's {vision['timm_model_name']}; use timm:NAME")
    if not isinstance(vision.get("layers"), int):
        raise UsageError(f"open_clip's {architecture} is no vision transformer; choose a ViT")
    weights = open_clip.get_pretrained_cfg(architecture, tag)
    quick = bool(config.get("quick_gelu"))
    if bool(weights.get("quick_gelu")) != quick:
        other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
        raise UsageError(f"the weights {tag!r} were trained with the other GELU; use open_clip:{other}/{tag}")
    native, patch = int(vision["image_size"]), int(vision["patch_size"])
    hub = str(weights.get("hf_hub", "")).rstrip("/")
    return BackboneSpec(
        name=name,
        library="open_clip",
        model_id=architecture,
        tag=tag,
        patch=patch,
        dim=int(vision["width"]),
        depth=int(vision["layers"]),
        prefix_tokens=1,
        source=f"https://huggingface.co/{hub}" if hub else str(weights.get("url")),
        mean=tuple(weights.get("mean", CLIP_MEAN)),
        std=tuple(weights.get("std", CLIP_STD)),
        native_size=native,
        default_size=_default_size(native, patch),
        interpolation=str(weights.get("interpolation", "bicubic")),
        default_tap=f"block{vision['layers']}",
    )


def input_size(preprocessing: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the backbone's input, from a store's preprocessing."""
    size = preprocessing["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
