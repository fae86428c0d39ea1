"""The house rules, read from the syntax trees: imports run down, and each thing that matters has one owner.

A contract takes the modules of both packages and names what breaks it, a line each. What a contract must let pass
stands in ``ALLOWED`` with its reason, and goes from there once nothing needs it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of each package, bottom to top: a room imports from those before it.
ROOMS = {
    "featcache": (
        "text", "errors", "words", "machine", "moments", "memory", "sources", "store", "backbones", "stream", "scale",
        "extraction", "upkeep", "bench", "library",
    ),
    "slotlab": (
        "words", "config", "models", "masks", "runs", "imported", "scoring", "protocols", "dynamics", "training",
        "planning", "pictures", "segment", "forecast", "report", "experiments", "commands",
    ),
}  # fmt: skip
FOREIGN = {"featcache": {"slotlab", "cli"}, "slotlab": {"cli"}}
BYTES = ("zarr", "numcodecs")
TERMINAL = ("rich", "typer", "click")
RUN_FILES = re.compile(
    r"\b(config\.toml|store\.json|metrics\.jsonl|summary\.json|state\.json|checkpoint/"
    r"|(model|average|optimizer)\.safetensors)|^(eval|robustness)-"
)

# Contract -> module -> why it may.
ALLOWED: dict[str, dict[str, str]] = {
    "models_open_no_store": {
        "slotlab.models.inputs": "reads splits for all models",
        "slotlab.models.build": "measures a fresh model on the store it will be trained on",
    },
    "the_store_alone_knows_bytes": {
        "featcache.stream.rows": "maps raw chunk files, and reads every other layout through zarr",
        "featcache.stream.stream": "names the type of the arrays that it hands to rows",
        "featcache.scale.recompute": "reduces any zarr array with dask",
        "featcache.upkeep.verify": "compares documents on the disk by zarr's reading of them",
        "featcache.upkeep.repair": "reads a video array whose group has lost its document",
    },
    "durable_alone_writes": {
        "featcache.sources.tfrecord": "makes data sets to read, for tests and samples",
        "slotlab.experiments.worker": "sends what a run prints to a file as it comes",
        "slotlab.training.speed": "asks Linux to measure memory anew",
        "slotlab.pictures.painted": "draws into memory",
        "slotlab.dynamics.files": "packs an archive in memory",
    },
}


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str  # dotted
    path: str  # from the root
    text: str
    modules: frozenset[str]  # names of all there are

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        return room_of(self.name)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and dotted name of every module imported anywhere in the file: in functions, and for types alone."""
        return [(node.lineno, name) for node in ast.walk(self.tree) for name in self._imported(node)]

    def _imported(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the package that holds this module
                parts = self.name.split(".") + ["__init__"] * self.path.endswith("__init__.py")
                base = ".".join([*parts[: -node.level], *filter(None, [base])])
            found = [f"{base}.{alias.name}" for alias in node.names]
            return [name if name in self.modules else base for name in found]
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        return []

    @cached_property
    def strings(self) -> list[tuple[int, str]]:
        """Line and value of every string that is not a docstring, and of each fixed part of an f-string."""
        prose = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}
        return [
            (node.lineno, node.value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        ]


Modules = Mapping[str, Module]  # by dotted name


@cache
def house(root: Path) -> Modules:
    """Every module of both packages below ``root``."""
    paths = [str(file.relative_to(root)) for package in ROOMS for file in sorted((root / package).rglob("*.py"))]
    names = frozenset(map(name_of, paths))
    return {name_of(path): Module(name_of(path), path, (root / path).read_text(), names) for path in paths}


def with_lines(modules: Modules, path: str, lines: str) -> Modules:
    """The same modules, one of them with more lines at its end; or one more."""
    name = name_of(path)
    before = modules[name].text if name in modules else ""
    names = next(iter(modules.values())).modules | {name}
    return {**modules, name: Module(name, path, f"{before}\n{lines}\n", names)}


def name_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def room_of(name: str) -> str:
    """``featcache.store.layout`` lies in ``store``; a package itself lies above its rooms, in none."""
    return name.split(".")[1] if "." in name else ""


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# -- the contracts -----------------------------------------------------------------------------------------


def packages_point_one_way(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """featcache imports neither slotlab nor cli, slotlab no cli; neither imports what is not shipped."""
    for module in modules.values():
        for line, name in module.imports:
            if within(name, "tests", "benchmarks", *FOREIGN[module.package]):
                yield module, line, f"imports {name}"


def rooms_point_down(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """A room imports from the rooms below it, in the order of ``ROOMS``."""
    for module in modules.values():
        order = (*ROOMS[module.package], "")
        if module.room not in order:
            yield module, 1, f"lies in {module.room}, a room without a place in ROOMS"
            continue
        for line, name in module.imports:
            if within(name, module.package) and name in modules:
                there = room_of(name)
                if name == module.package:
                    if module.room and _takes_more_than_the_version(module, line):
                        yield module, line, f"imports {name}, which is above all rooms"
                elif there in order and order.index(there) > order.index(module.room):
                    yield module, line, f"imports {name}, from a room above {module.room}"


def _takes_more_than_the_version(module: Module, line: int) -> bool:
    return any(
        isinstance(node, (ast.Import, ast.ImportFrom))
        and node.lineno == line
        and [alias.name for alias in node.names] != ["__version__"]
        for node in ast.walk(module.tree)
    )


def modules_form_no_circle(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """Within a room, too, no module imports one that imports it."""
    graph = {m.name: {name for _, name in m.imports if name in modules and name != m.name} for m in modules.values()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield modules[error.args[1][0]], 1, f"imports itself through {' <- '.join(error.args[1])}"


def config_is_the_ground_floor(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """A configuration is read without torch: config knows no room of slotlab, and of featcache its words and errors."""
    light = ("slotlab.config", "slotlab.words", "featcache.text", "featcache.errors", "featcache.words")
    heavy = ("torch", "torchvision", "numpy", "scipy", "zarr", "timm", "open_clip", "matplotlib", *TERMINAL)
    for module in modules.values():
        if within(module.name, *light):
            for line, name in module.imports:
                if within(name, *heavy) or (within(name, *ROOMS) and not within(name, *light)):
                    yield module, line, f"imports {name}"


def models_open_no_store(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """Models see tensors: what they read of a store is models/inputs.py's alone."""
    for module in modules.values():
        if within(module.name, "slotlab.models"):
            for line, name in module.imports:
                if within(name, "featcache.store", "featcache.stream"):
                    yield module, line, f"imports {name}"


def masks_know_no_truth(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """What is done to masks is done without ground truth: no scores, no stores, no sources."""
    for module in modules.values():
        if within(module.name, "slotlab.masks"):
            for line, name in module.imports:
                if within(name, "slotlab.scoring", "featcache.store", "featcache.stream", "featcache.sources"):
                    yield module, line, f"imports {name}"


def commands_alone_speak(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """Every other room returns what is to be said: it prints nothing and knows no terminal."""
    for module in modules.values():
        if within(module.name, "slotlab.commands"):
            continue
        for line, name in module.imports:
            if within(name, "slotlab.commands", *TERMINAL):
                yield module, line, f"imports {name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield module, node.lineno, "prints"


def runs_alone_name_their_files(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """The names of a run folder's files are written down in slotlab/runs."""
    for module in modules.values():
        if module.package == "slotlab" and not within(module.name, "slotlab.runs"):
            for line, text in module.strings:
                if RUN_FILES.search(text):
                    yield module, line, f"names {text!r}"


def the_store_alone_knows_bytes(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """Arrays and codecs are featcache/store's."""
    for module in modules.values():
        if not within(module.name, "featcache.store"):
            for line, name in module.imports:
                if within(name, *BYTES):
                    yield module, line, f"imports {name}"


def durable_alone_writes(modules: Modules) -> Iterator[tuple[Module, int, str]]:
    """A file is written whole or not at all: by the functions of featcache/store/durable.py."""
    ready = ("write_text", "write_bytes", "savefig", "save_file", "savez", "savez_compressed", "tofile", "touch")
    for module in modules.values():
        if module.name == "featcache.store.durable":
            continue
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name == "open" and (whole := ast.unparse(node)).partition("(")[0] != "av.open":  # which writes to memory
                flags = re.search(r"O_CREAT|O_WRONLY|O_RDWR", whole)
                if flags or re.search(r"""[(, =]['"][rbt]*[wax+][rwaxbt+]*['"]""", whole):
                    yield module, node.lineno, "opens a file to write"
            elif isinstance(node.func, ast.Attribute) and name in ready:
                yield module, node.lineno, f"calls {name}"


Contract = Callable[[Modules], Iterator[tuple[Module, int, str]]]
CONTRACTS: tuple[Contract, ...] = (
    packages_point_one_way,
    rooms_point_down,
    modules_form_no_circle,
    config_is_the_ground_floor,
    models_open_no_store,
    masks_know_no_truth,
    commands_alone_speak,
    runs_alone_name_their_files,
    the_store_alone_knows_bytes,
    durable_alone_writes,
)


def broken(contract: Contract, modules: Modules) -> list[str]:
    allowed = ALLOWED.get(contract.__name__, {})
    return [f"{module.path}:{line}: {what}" for module, line, what in contract(modules) if module.name not in allowed]


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_kept(contract: Contract) -> None:
    assert broken(contract, house(ROOT)) == [], contract.__doc__


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_nothing_is_allowed_that_nobody_needs(contract: Contract) -> None:
    needed = {module.name for module, _, _ in contract(house(ROOT))}
    assert sorted(set(ALLOWED.get(contract.__name__, {})) - needed) == []


def test_every_room_is_there() -> None:
    for package, rooms in ROOMS.items():
        there = {room_of(name) for name in house(ROOT) if within(name, package)} - {""}
        assert sorted(rooms) == sorted(there)


@pytest.mark.parametrize(
    ("contract", "path", "lines"),
    [
        (packages_point_one_way, "featcache/moments.py", "import slotlab"),
        (packages_point_one_way, "featcache/moments.py", "from slotlab import segment"),
        (packages_point_one_way, "featcache/store/layout.py", "def f():\n    from slotlab.runs import folder"),
        (packages_point_one_way, "slotlab/segment.py", "import cli"),
        (packages_point_one_way, "slotlab/commands/app.py", "from tests import synthetic"),
        (packages_point_one_way, "featcache/errors.py", "import importlib\nimportlib.import_module('slotlab.segment')"),
        (rooms_point_down, "featcache/store/spec.py", "from featcache.stream.stream import FeatureStream"),
        (rooms_point_down, "featcache/backbones/taps.py", "from ..extraction import plan"),
        (rooms_point_down, "slotlab/runs/folder.py", "from slotlab.scoring import evaluate"),
        (rooms_point_down, "slotlab/models/base.py", "if TYPE_CHECKING:\n    from slotlab.runs import loaded"),
        (rooms_point_down, "slotlab/scoring/metrics.py", "from slotlab import load"),
        (rooms_point_down, "slotlab/attic/new.py", "x = 1"),
        (modules_form_no_circle, "featcache/store/spec.py", "from featcache.store import reading"),
        (config_is_the_ground_floor, "slotlab/config/schema.py", "import torch"),
        (config_is_the_ground_floor, "slotlab/config/model.py", "from slotlab.models import decoders"),
        (config_is_the_ground_floor, "slotlab/config/load.py", "from featcache.store.spec import StoreSpec"),
        (config_is_the_ground_floor, "featcache/words.py", "import torch.nn"),
        (models_open_no_store, "slotlab/models/slot_model.py", "from featcache.store.reading import FeatureStore"),
        (models_open_no_store, "slotlab/models/clustering/model.py", "def f():\n    import featcache.stream.stream"),
        (masks_know_no_truth, "slotlab/masks/refine.py", "from slotlab.scoring import metrics"),
        (masks_know_no_truth, "slotlab/masks/labels.py", "from featcache.sources.video import Video"),
        (commands_alone_speak, "slotlab/scoring/evaluate.py", "from rich.table import Table"),
        (commands_alone_speak, "slotlab/scoring/evaluate.py", "print('done')"),
        (commands_alone_speak, "slotlab/scoring/evaluate.py", "from slotlab.commands.terminal import warn"),
        (commands_alone_speak, "featcache/scale/report.py", "def f():\n    from rich import print"),
        (commands_alone_speak, "slotlab/training/look.py", "import typer"),
        (durable_alone_writes, "slotlab/pictures/sheet.py", "path.write_text('x')"),
        (durable_alone_writes, "slotlab/runs/folder.py", "with path.open('a') as log:\n    log.write('x')"),
        (durable_alone_writes, "featcache/upkeep/verify.py", "open(path, mode='wb')"),
        (durable_alone_writes, "featcache/upkeep/verify.py", "os.open(path, os.O_WRONLY | os.O_CREAT)"),
        (runs_alone_name_their_files, "slotlab/pictures/sheet.py", "x = run / 'config.toml'"),
        (runs_alone_name_their_files, "slotlab/pictures/sheet.py", "x = run / f'eval-{split}.json'"),
        (runs_alone_name_their_files, "slotlab/segment.py", "x = run / 'checkpoint/model.safetensors'"),
        (the_store_alone_knows_bytes, "featcache/bench/stream.py", "import zarr"),
        (the_store_alone_knows_bytes, "featcache/extraction/job.py", "from zarr.codecs import BytesCodec"),
        (the_store_alone_knows_bytes, "slotlab/segment.py", "import numcodecs"),
    ],
)  # fmt: skip
def test_a_breach_is_found(contract: Contract, path: str, lines: str) -> None:
    found = set(broken(contract, with_lines(house(ROOT), path, lines))) - set(broken(contract, house(ROOT)))
    assert found and (contract is modules_form_no_circle or all(line.startswith(path) for line in found)), found


@pytest.mark.slow
def test_what_reads_like_a_breach_is_none() -> None:
    """Prose may name a file; a log's row may be looked at; slotlab may take the version from featcache."""
    harmless = '''
def f():
    """Reads ``metrics.jsonl``, and prints nothing: import slotlab, from rich import print."""
    return "evaluation", "fingerprint(x)", "slotlab.zarr"
'''
    version = "from featcache import __version__\n"
    for path, lines in {"featcache/moments.py": harmless, "slotlab/scoring/metrics.py": version + harmless}.items():
        modules = with_lines(house(ROOT), path, lines)
        assert [broken(contract, modules) for contract in CONTRACTS] == [
            broken(contract, house(ROOT)) for contract in CONTRACTS
        ]
