"""The provenance of every number in a report."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slotlab.report.gather import RunData
from slotlab.runs import checkpoint
from slotlab.runs.folder import LOG, SUMMARY, result_path, trained_on

PACKAGES = ("slotlab", "torch", "numpy", "zarr", "scipy", "pillow", "matplotlib")


@dataclass(frozen=True)
class Source:
    """The source of some numbers: what they are, their file, and the command that makes them again."""

    numbers: str
    file: str
    command: str


@dataclass(frozen=True)
class Provenance:
    """The provenance of one run: facts by name, and sources."""

    name: str
    facts: tuple[tuple[str, str], ...]
    sources: tuple[Source, ...]
    identity: tuple[tuple[str, str], ...]  # flat identity of the store


def provenance(run: RunData) -> Provenance:
    """The provenance of one run, from its folder and store."""
    identity = json.loads(json.dumps(run.store.spec.identity()))
    facts = [("run folder", str(run.path)), ("seed", str(run.config.seed))]
    origin = trained_on(run.path)["imported"]
    if origin is not None:
        at = f"step {origin['step']}" if origin["step"] else "a step that it does not tell"
        facts.append(("imported from", f"{origin['checkpoint']} ({origin['repository']}), at {at}"))
        facts.append(("imported file", f"sha256 {origin['sha256']}"))
    if run.step is not None:
        weights = weights_file(run.path)
        if origin is None:
            facts.append(("checkpoint", f"step {run.step} of {run.config.optim.steps}, written {when(weights)}"))
        facts.append(("model weights", f"{weights.relative_to(run.path)}, sha256 {digest_of_file(weights)}"))
    facts += [
        ("feature store", str(run.store.path)),
        ("store identity", f"sha256 {hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}"),
        ("backbone", f"{run.store.spec.backbone}, tap {run.tap}"),
        ("backbone weights", backbone_weights(run.store.spec.model)),
        ("videos scored", f"split {run.split.name}, source fingerprint {run.split.spec.source_fingerprint}"),
    ]
    made = run.path / SUMMARY
    if made.exists():
        found = json.loads(made.read_text())
        versions = ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items())
        facts.append(("trained on", f"{found.get('device', '?')}, {found.get('processes', 1)} processes; {versions}"))
    return Provenance(run.name, tuple(facts), tuple(sources(run)), tuple((k, str(v)) for k, v in identity.items()))


def sources(run: RunData) -> list[Source]:
    """The files of a run's numbers, and the commands that make them again."""
    origin = trained_on(run.path)["imported"]
    train: tuple[object, ...] = (
        "train",
        "--cache",
        run.store.path,
        "--config",
        run.path / checkpoint.CONFIG,
        "--out",
        f"{run.path}-again",
    )
    found = [Source("training curves", str(run.path / LOG), command(*train))]
    if origin is not None:
        found = [Source("weights", str(weights_file(run.path)), import_command(run.path, origin))]
    if run.evaluation is not None:
        path = result_path(run.path, run.split.name)
        where = f"{path}, written {when(path)}" if run.kept else "computed for this report"
        scored = ("eval", run.path, "--cache", run.store.path, "--split", run.split.name, "--json")
        found.append(Source("scores, ceiling, floors, groups", where, command(*scored)))
    if run.rollout is not None:
        path = result_path(run.path, run.split.name, "rollout")
        where = f"{path}, written {when(path)}" if run.kept else "computed for this report"
        rolled = ("rollout", run.path, "--tracks", run.store.path, "--split", run.split.name, "--json")
        found.append(Source("predictions", where, command(*rolled)))
    if run.config.data.train_split in run.store.splits:
        stats = ("stats", run.store.path, "--split", run.config.data.train_split, "--json")
        found.append(Source("feature scale", str(run.store.path), command(*stats)))
    if run.loaded is not None:
        report = ("report", run.path, "--split", run.split.name, "--json")
        found.append(Source("curves over the frames, gallery", "computed for this report", command(*report)))
    return found


def import_command(run: Path, origin: Mapping[str, Any]) -> str:
    """The command that imports a run again."""
    words: list[object] = ["import-run", origin["checkpoint"], "--from", origin["source"]]
    for setting in origin["set"]:
        words += ["--set", setting]
    words += ["--backbone", origin["backbone"], "--input-size", "x".join(map(str, origin["input_size"]))]
    return command(*words, "--out", f"{run}-again")


def environment() -> tuple[tuple[str, str], ...]:
    """The time of the report, and the versions of the packages that made it."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (("made", made), ("versions", f"python {platform.python_version()}, {packages}"))


def command(*words: object) -> str:
    """A slotlab command as one would type it."""
    return shlex.join(["slotlab", *map(str, words)])


def report_command(runs: Sequence[Path], out: Path, options: Sequence[tuple[str, Any]]) -> str:
    """The command that makes a report again."""
    words: list[object] = ["report", *runs, "-o", out]
    for name, value in options:
        if value is not None:
            words += [f"--{name}", value]
    return command(*words)


def weights_file(run: Path) -> Path:
    """The file of the evaluated weights: averaged ones if the run has them."""
    averaged = checkpoint.folder(run) / checkpoint.AVERAGE
    return averaged if averaged.exists() else checkpoint.folder(run) / checkpoint.MODEL


def backbone_weights(model: Any) -> str:
    """Name and checksum of the frozen weights, as the store records them."""
    parts = [str(model[key]) for key in ("library", "model_id", "weights_tag") if model.get(key)]
    if model.get("weights_sha256"):
        parts.append(f"sha256 {model['weights_sha256']}")
    return ", ".join(parts) or "–"


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def when(path: Path) -> str:
    """The time of a file's last change, UTC."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
