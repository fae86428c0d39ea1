"""Backbones: every short name runs, taps mean what they say, and two libraries agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import forward
from featcache.backbones.registry import ALIASES, BackboneSpec, get_spec, list_backbones
from featcache.errors import UsageError

ROOT = Path(__file__).parents[1]


def images(size: int = 224, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# -- the registry ------------------------------------------------------------------------------------------


def test_registry_needs_no_torch() -> None:
    code = (
        "import sys; from featcache.backbones.registry import get_spec; get_spec('dinov2'); "
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_aliases_are_the_logs_three() -> None:
    assert {alias: get_spec(alias).name for alias in ALIASES} == {
        "dinov2": "dinov2_vits14",
        "dino": "dino_vits16",
        "clip": "clip_vitb16",
    }


@pytest.mark.parametrize("spec", list_backbones(), ids=lambda spec: spec.name)
def test_registry_agrees_with_the_library(spec: BackboneSpec) -> None:
    config = timm.get_pretrained_cfg(spec.model_id)
    assert config is not None
    assert spec.mean == config.mean and spec.std == config.std
    assert spec.native_size == config.input_size[-1]
    assert spec.interpolation == config.interpolation
    assert str(config.hf_hub_id) in spec.source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2_vits", r"did you mean dinov2_vits14"),
        ("zzz", r"known: dinov2_vits14, .*timm:NAME"),
        ("timm:resnet19", r"timm has no model 'resnet19'; did you mean resnet18"),
        ("timm:resnet18.nope", r"no weights 'nope' .*a1_in1k"),
        ("open_clip:ViT-B-17/openai", r"no architecture 'ViT-B-17'; did you mean ViT-B-16"),
        ("open_clip:ViT-B-16", r"open_clip:ViT-B-16/TAG, one of .*laion2b_s34b_b88k"),
        ("open_clip:ViT-B-16/openai", r"use open_clip:ViT-B-16-quickgelu/openai"),
        ("open_clip:RN50/openai", r"no vision transformer|quickgelu"),
        ("open_clip:ViT-B-16-SigLIP/webli", r"use timm:NAME"),
    ],
)
def test_unknown_name_says_what_is_near(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        get_spec(name)
    assert "\n" not in str(caught.value)


# -- every name runs ---------------------------------------------------------------------------------------


LARGE = [pytest.mark.slow]  # ViT-B: a second and more for its random weights alone


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=spec.name, marks=LARGE if spec.dim == 768 else ()) for spec in list_backbones()]
)
def test_short_name_builds_and_runs(spec: BackboneSpec) -> None:
    backbone = load_backbone(spec.name, "random")
    frames = torch.randint(0, 256, (1, 60, 80, 3), dtype=torch.uint8)
    (tokens,) = backbone(backbone.preprocess(frames)).values()
    side = 224 // spec.patch
    assert backbone.grid == (side, side)
    assert tokens.shape == (1, side * side, spec.dim)
    assert backbone.dims == {backbone.taps[0]: spec.dim}
    assert tokens.isfinite().all() and tokens.std() > 0.01
    assert backbone.provenance["weights_tag"] == "random"
    assert backbone.provenance["prefix_tokens_dropped"] == getattr(backbone._towers[""].model, "num_prefix_tokens", 0)
    if spec.depth == 12:
        assert len(backbone._towers[""].blocks) == 12 and backbone.taps == ("block12",)


@pytest.mark.parametrize(
    ("name", "patch", "prefix"),
    [
        ("timm:convnext_atto", 32, 0),
        ("timm:eva02_tiny_patch14_224", 14, 1),
        ("timm:deit_tiny_patch16_224", 16, 1),
        ("timm:swin_tiny_patch4_window7_224", 32, 0),
    ],
)
def test_other_names_of_timm_pass_through(name: str, patch: int, prefix: int) -> None:
    backbone = load_backbone(name, "random")
    (tokens,) = backbone(images()).values()
    assert backbone.spec.prefix_tokens == prefix
    assert backbone.patch == patch and backbone.grid == (224 // patch,) * 2
    assert tokens.shape == (1, (224 // patch) ** 2, backbone.spec.dim)


def test_random_weights_are_the_seeds_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone("dino", "random")
    assert torch.equal(torch.rand(3), expected)
    second = load_backbone("dino", "random")
    assert first.provenance["weights_sha256"] == second.provenance["weights_sha256"] is not None


@pytest.mark.parametrize("name", ["dinov2", "dino", "dinov3_vits16", "dinov2_vits14_reg"])
def test_other_input_sizes(name: str) -> None:
    backbone = load_backbone(name, "random", taps=["block2"], input_size=448)
    side = 448 // backbone.spec.patch
    assert backbone(images(448))["block2"].shape == (1, side * side, 384)


# -- taps --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dinov2", "dinov3_vits16", pytest.param("open_clip:ViT-B-32-quickgelu/openai", marks=LARGE)]
)
def test_several_taps_in_one_pass_equal_each_alone(name: str) -> None:
    taps = ["block12.norm", "block3", "block2.key", "block12"]
    x = images()
    together = load_backbone(name, "random", taps=[*taps, "block3"])
    assert together.taps == tuple(taps)
    tokens = together(x)
    assert list(tokens) == taps
    for tap in taps:
        torch.testing.assert_close(tokens[tap], load_backbone(name, "random", taps=[tap])(x)[tap])


def test_pass_ends_with_the_last_block_needed() -> None:
    backbone = load_backbone("dino", "random", taps=["block2.key", "block3"])
    seen: list[int] = []
    for index, block in enumerate(backbone._towers[""].blocks):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    backbone(images())
    assert seen == [0, 1, 2]


def test_taps_are_what_the_whole_model_computes() -> None:
    backbone = load_backbone("dinov2_vits14_reg", "random", taps=["block12", "block12.norm"])
    seen: list[Tensor] = []
    x = images()
    model = backbone._towers[""].model
    handle = model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        final = model.forward_features(x)  # class token, 4 registers, patches
    handle.remove()
    tokens = backbone(x)
    torch.testing.assert_close(tokens["block12"], seen[0][:, 5:])
    torch.testing.assert_close(tokens["block12.norm"], final[:, 5:])


@pytest.mark.parametrize("name", ["dino", "dinov2_vits14_reg"])
def test_facets_equal_a_hook_on_the_fused_projection(name: str) -> None:
    facets = ["query", "key", "value"]
    backbone = load_backbone(name, "random", taps=[f"block9.{facet}" for facet in facets])
    seen: list[Tensor] = []
    attention, x = backbone._towers[""].model.blocks[8].attn, images()
    torch.nn.init.normal_(attention.qkv.bias)  # zero in a fresh model, which would hide a wrong bias
    handle = attention.qkv.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = backbone(x)
    handle.remove()
    for facet, expected in zip(facets, seen[0][:, backbone.spec.prefix_tokens :].chunk(3, -1), strict=True):
        torch.testing.assert_close(tokens[f"block9.{facet}"], expected)


@pytest.mark.parametrize(
    "name",
    ["dinov3_vits16", "timm:eva02_tiny_patch14_224", pytest.param("timm:beit_base_patch16_224", marks=LARGE)],
)
def test_facets_of_other_families_are_what_attention_uses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(name, "random", taps=["block1.value"])
    seen: list[Tensor] = []
    attention = backbone._towers[""].model.blocks[0].attn
    for bias in ("q_bias", "v_bias"):
        if getattr(attention, bias, None) is not None:
            torch.nn.init.normal_(getattr(attention, bias))
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(v)  # (B, heads, L, D / heads); values alone are not rotated
        return attend(q, k, v, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tokens = backbone(images())["block1.value"]
    expected = seen[0].transpose(1, 2).flatten(2)[:, backbone.spec.prefix_tokens :]
    torch.testing.assert_close(tokens, expected)


def test_layers_of_a_convolutional_network_are_rows_of_their_map() -> None:
    backbone = load_backbone("resnet18", "random", taps=["layer4"])
    seen: list[Tensor] = []
    backbone._towers[""].model.layer4.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = backbone(images())["layer4"]
    assert backbone.grid == (7, 7) and backbone.dims == {"layer4": 512}
    torch.testing.assert_close(tokens[0, 7 * 2 + 3], seen[0][0, :, 2, 3])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dinov2", {"taps": ["block13"]}, r"no block 13 .* 1 to 12"),
        ("dinov2", {"taps": ["block0"]}, r"no tap 'block0'.*block1 to block12"),
        ("dinov2", {"taps": ["block3.keys"]}, r"no facet 'keys' .*\.key"),
        ("dinov2", {"taps": ["layer3"]}, r"no tap 'layer3'"),
        ("resnet18", {"taps": ["block3"]}, r"its taps are .*layer1, layer2, layer3, layer4"),
        ("resnet18", {"taps": ["layer3", "layer4"]}, r"layer3 every 16 px, layer4 every 32 px"),
        ("dinov2", {"input_size": 256}, r"256 .*14 px; nearest: 252 and 266"),
        ("dino", {"input_size": 225}, r"nearest: 224 and 240"),
        ("dino", {"input_size": 7}, r"nearest: 16"),
        ("resnet18", {"input_size": 250}, r"nearest: 240 and 256"),
    ],
)
def test_what_cannot_be_tapped_or_fed_is_explained(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_backbone(name, "random", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(B, 3, 224, 224\)"):
        load_backbone("dino", "random")(images(240))


# -- two libraries -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 320])
def test_open_clip_and_timm_give_equal_tokens_for_the_same_clip(tmp_path: Path, size: int) -> None:
    name = "open_clip:ViT-B-16-quickgelu/openai"
    source = load_backbone(name, "random")._towers[""].model
    path = tmp_path / "clip.safetensors"
    save_file({f"visual.{k}": v.contiguous() for k, v in source.state_dict().items()}, path)

    taps = ["block6", "block6.query", "block6.key", "block6.value", "block12", "block12.norm"]
    ours = load_backbone(name, str(path), taps=taps, input_size=size)
    theirs = load_backbone("clip_vitb16", str(path), taps=taps, input_size=size)

    x = images(size)
    a, b = ours(x), theirs(x)
    for tap in taps:
        torch.testing.assert_close(a[tap], b[tap], atol=2e-5, rtol=1e-4, msg=tap)
    assert ours.preprocessing == theirs.preprocessing


# -- preprocessing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return load_backbone("resnet18", "random")


@settings(max_examples=20, deadline=None)
@given(height=st.integers(40, 500), width=st.integers(40, 500))
def test_preprocessing_never_crops(resnet: Backbone, height: int, width: int) -> None:
    frame = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    rows, columns = height // 10 + 1, width // 10 + 1
    frame[:, :rows] = frame[:, -rows:] = 255
    frame[:, :, :columns] = frame[:, :, -columns:] = 255
    image = resnet.preprocess(frame)[0, 0]  # a white border must be on all four sides, dark inside
    white, black = (1 - 0.485) / 0.229, -0.485 / 0.229
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):
        torch.testing.assert_close(border, torch.full((224,), white), atol=0.05, rtol=0)
    assert image[112, 112] == pytest.approx(black, abs=0.05)


def test_preprocessing_equals_pillows_antialiased_resize(resnet: Backbone) -> None:
    # Noise that never clips: Pillow also clips between its two passes.
    frame = np.random.default_rng(0).integers(70, 190, (256, 192, 3), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(frame).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (pillow - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = resnet.preprocess(torch.from_numpy(frame)[None])
    assert found.dtype == torch.float32 and found.shape == (1, 3, 224, 224)
    # one grey level, 1 / 255 / 0.225, is the rounding of the two implementations
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=0.018)


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, 3)])
def test_frames_of_another_layout_are_refused(resnet: Backbone, frames: Tensor) -> None:
    with pytest.raises(UsageError, match=r"uint8 \(B, H, W, 3\)"):
        resnet.preprocess(frames)


def test_float32_is_float32_in_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would round what the patch embedding multiplies to ten bits."""
    seen, call = [], Backbone.__call__

    def noted(self: Backbone, images: Tensor) -> dict[str, Tensor]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return call(self, images)

    monkeypatch.setattr(Backbone, "__call__", noted)
    backbone = load_backbone("resnet18", "random", taps=("layer1",), input_size=32)
    forward(backbone, [np.zeros((1, 32, 32, 3), np.uint8)], 1, "float32")
    assert seen == [False] and torch.backends.cudnn.allow_tf32
