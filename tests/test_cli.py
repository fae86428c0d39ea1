"""The command line: exit codes, one-line errors, JSON on stdout and nothing else there, fast start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from featcache.store import manifest
from featcache.store.reading import FeatureStore
from slotlab.commands import doctor
from tests.commands import Slotlab

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
EXTRACT = ("extract", "--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", "32")


Fails = Callable[..., None]


def process(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a Python of its own, whose start takes seconds: for what only a process shows."""
    command = [sys.executable, "-m", "cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def fails(slotlab: Slotlab) -> Fails:
    """A command that ends with this code and one line, which has this message."""

    def check(code: int, message: str, *args: object) -> None:
        ended = slotlab(*args)
        assert ended.code == code, ended.said
        assert message in ended.said and ended.out == ""

    return check


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys, cli
from typer.testing import CliRunner
assert CliRunner().invoke(cli.app, ["--help"]).exit_code == 0
print([m for m in ("torch", "timm", "zarr", "h5py", "tensorflow_datasets", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_lists_the_commands(slotlab: Slotlab) -> None:
    done = slotlab("--help")
    assert done.code == 0
    for command in ("extract", "stats", "train", "eval", "demo", "verify", "weights", "doctor"):
        assert command in done.out


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "unknown backbone 'dinov2_vits15'", ("extract", "--backbone", "dinov2_vits15")),
        (2, "no block 13", ("extract", "--weights", "random", "--tap", "block13")),
        (2, "float64' is not one of", ("extract", "--dtype", "float64")),
        (2, "No such option", ("extract", "--bakbone", "dino")),
        (2, "No such command", ("extrct",)),
        (3, "no such store", ("train", "--cache", "none.zarr")),
        (2, "--preset best: unknown", ("train", "--cache", "none.zarr", "--preset", "best")),
        (3, "runs/none: not a run", ("eval", "runs/none")),
        (2, "name a file that ends in .png", ("eval", "runs/none", "--sheet", "masks.xyz")),
        (3, "cannot be read", ("train", "--cache", "none.zarr", "--config", ".")),
        (3, "no stores; make one with", ("stats",)),
        (2, "--device quantum", ("extract", "--weights", "random", "--device", "quantum")),
    ],
)
def test_mistakes_are_one_line_with_an_exit_code(fails: Fails, code: int, message: str, args: tuple[str, ...]) -> None:
    fails(code, message, *args)


@pytest.mark.slow
def test_a_mistake_ends_the_process_so(tmp_path: Path) -> None:
    done = process("train", "--cache", "none.zarr", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("slotlab: none.zarr: no such store")


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = process("--debug", "train", "--cache", "none.zarr", cwd=tmp_path)
    assert "Traceback" in done.stderr and done.returncode != 0


def test_from_a_store_to_scores(tmp_path: Path, store: FeatureStore, slotlab: Slotlab, fails: Fails) -> None:
    """stats, train, eval and verify as people type them, each with clean JSON on stdout."""
    (tmp_path / "cache").mkdir()
    store.path.rename(tmp_path / "cache/synthetic.zarr")
    stats = slotlab("stats", "--json").json["stores"][0]
    assert stats["path"] == "cache/synthetic.zarr" and stats["frames"] == 17
    recomputed = slotlab("stats", "--recompute", "--json").json["stores"][0]
    assert recomputed["std"] == pytest.approx(stats["std"], rel=1e-9)
    assert slotlab("stats", "--plot", "scale.png").code == 0
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")

    trained = slotlab(
        "train", "--cache", "cache/synthetic.zarr", "--steps", 3, "--batch-size", 4, "--set", "model.slots=4",
        "--normalize", "slow=8", "--out", "runs/one",
    )  # fmt: skip
    assert trained.code == 0 and "step 3/3" in trained.said
    result = slotlab("eval", "runs/one", "--json", "--sheet", "masks.png").json
    assert result["frames"] == 8 and 0 <= result["mbo"] <= 1
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert slotlab("eval", "runs/one", "--sheet", "masks.png/b.png").code == 3  # below a file
    kept = tmp_path / "runs/one/eval-validation.json"
    kept.unlink()
    kept.mkdir()  # as good as a folder that cannot be written
    again = slotlab("eval", "runs/one", "--json")
    assert again.json["mbo"] == result["mbo"] and "cannot be written" in again.said
    fails(2, "choose one with --split: train", "eval", "runs/one", "--split", "trian")
    fails(
        3, "masks.png",
        "train", "--cache", "cache/synthetic.zarr", "--normalize", "slow=8", "--out", "masks.png/a"
    )  # fmt: skip
    big = ("train", "--cache", "cache/synthetic.zarr", "--normalize", "slow=8", "--out", "runs/big")
    fails(3, "out of memory; take a smaller --batch-size", *big, "--batch-size", 10**11)
    fails(2, "no checkpoint yet: delete it", *big)
    fails(2, "is a store", "train", "--cache", "cache/synthetic.zarr", "--out", "cache/synthetic.zarr")
    fails(
        2, "no split 'trian'",
        "train", "--cache", "cache/synthetic.zarr", "--set", "data.eval_split=trian", "--out", "runs/two"
    )  # fmt: skip

    assert slotlab("verify", "cache/synthetic.zarr", "--json").json["damaged"] == []
    next((tmp_path / "cache/synthetic.zarr/train/video").glob("c.*")).write_bytes(b"")
    assert slotlab("verify", "cache/synthetic.zarr").code == 3
    fails(2, "exists already", "train", "--cache", "cache/synthetic.zarr", "--out", "runs/one")
    fails(
        4, "another configuration",
        "train", "--cache", "cache/synthetic.zarr", "--out", "runs/one", "--resume", "--seed", 9
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory; take a smaller --batch-size"),
        (RuntimeError("CUDA error: out of memory"), "--set data.residence=device needs less"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; take a smaller --batch-size"),
    ],
    ids=["allocation", "pinning", "map"],
)
def test_memory_that_is_used_up_is_one_line(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, store: FeatureStore, error: Exception, told: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("slotlab.training.train.train", full)
    fails(3, told, "train", "--cache", store.path, "--device", "cpu")


@pytest.mark.parametrize("speed, warned", [(0.012, True), (2.5, False)])
def test_emulated_bfloat16_is_warned_of(
    store: FeatureStore, slotlab: Slotlab, monkeypatch: pytest.MonkeyPatch, speed: float, warned: bool
) -> None:
    monkeypatch.setattr(doctor, "bfloat16_speed", lambda: speed)
    command = ["train", "--cache", store.path, "--steps", 1, "--batch-size", 2, "--device", "cpu"]
    command += ["--set", "model.slots=4", "--set", "optim.warmup_steps=0", "--normalize", "slow=8"]
    for precision in ("float32", "bfloat16"):
        ended = slotlab(*command, "--set", f"optim.precision={precision}", "--out", precision)
        said = "bfloat16 has 0.012 of float32's speed on the CPU" in " ".join(ended.said.split())
        assert said == (warned and precision == "bfloat16")


def test_dry_run_writes_nothing(tmp_path: Path, slotlab: Slotlab) -> None:
    plan = slotlab(*EXTRACT, "--max-videos", 1, "--out", "a.zarr", "--batch-size", 8, "--plan", "--json").json
    assert plan["frames_left"] == 48 and plan["bytes_left"] > 48 * 256 * 256 * 3 and plan["seconds"] > 0
    assert not (tmp_path / "a.zarr").exists()


def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    """As at a Ctrl-C in the first moment: the import of a module is where it arrives."""
    code = """
import sys
class Interrupted:
    def find_spec(name, *_):
        if name == "slotlab.commands.bench":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted)
import cli
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stderr == "slotlab: interrupted before it began\n" and not ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_extraction_leaves_130_and_resumes(tmp_path: Path, slotlab: Slotlab, sign: signal.Signals) -> None:
    path = tmp_path / "a.zarr"
    extract = [*EXTRACT, "--split", "train", "--batch-size", "8", "--precision", "float32", "--out", str(path)]
    command = [sys.executable, "-m", "cli", *extract, "--max-videos", "20"]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(manifest.read(path / "train") if path.exists() else ()) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors and "Traceback" not in errors
    finished = len(manifest.read(path / "train"))
    assert finished >= 2
    assert slotlab(*extract, "--max-videos", finished + 1).code == 0
    assert len(FeatureStore.open(path)["train"].manifest) >= finished + 1
