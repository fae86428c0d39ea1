"""slotlab plan: what a data set and a configuration will need on a device."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Json, parse_size, print_json

if TYPE_CHECKING:
    from slotlab.planning.plan import Plan, TrainingPlan


def plan(
    device: Annotated[
        str, typer.Option(help="Device: rtx5090, rtx4090, a100-80, h100, h200; cpu or here are measured.")
    ] = "here",
    cache: Annotated[Path | None, typer.Option(help="Store whose data are planned for.")] = None,
    data: Annotated[str | None, typer.Option(help="Source of videos, as for extract.")] = None,
    videos: Annotated[int | None, typer.Option(min=1, help="Number of videos, where neither is at hand.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each of these videos.")] = 24,
    frame_size: Annotated[str, typer.Option(help="Size of their frames: a side, or 128x224.")] = "256",
    backbone: Annotated[str, typer.Option(help="Backbone of a store that is not made yet.")] = "dinov2",
    tap: Annotated[list[str] | None, typer.Option(help="Its taps; repeatable; default: the last block.")] = None,
    input_size: Annotated[str | None, typer.Option(help="Size of its input in pixels.")] = None,
    preset: Annotated[str, typer.Option(help="Name of a shipped configuration.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over the preset.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting as key=value, for example optim.batch_size=64; repeatable."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a step: frames, or clips.")] = None,
    slots: Annotated[
        int, typer.Option(min=1, help="Slots of the run whose tracks a world model is trained on, without --cache.")
    ] = 13,
    as_json: Json = False,
) -> None:
    """Disk, memory and time that extraction and training will take on a device, counted before they run."""
    from slotlab.config.load import load_config

    if (cache is not None) + (data is not None) + (videos is not None) != 1:
        raise UsageError("plan: name the data by one of --cache STORE, --data SOURCE and --videos N")
    settings = load_config(preset, config, override or (), optim__batch_size=batch_size)
    from featcache.backbones.backbone import outline
    from featcache.sources import open_source
    from featcache.store.encoding import ENCODINGS
    from featcache.store.reading import FeatureStore
    from slotlab.planning.data import DataSet
    from slotlab.planning.devices import find_device
    from slotlab.planning.plan import make_plan

    place = find_device(device, settings.optim.precision)
    if cache is not None:
        store = FeatureStore.open(cache)
        made = make_plan(settings, DataSet.of_store(store), place, [store.spec.dtype])
    else:
        tower = outline(backbone, tuple(tap or ()), parse_size("--input-size", input_size))
        if data is not None:
            of = DataSet.of_source(open_source(data), tower)
        else:
            size = parse_size("--frame-size", frame_size)
            assert videos is not None and size is not None
            sides = (size, size) if isinstance(size, int) else size
            of = DataSet.of_counts(videos, frames, sides, tower, settings.data.train_split)
        forms = list(ENCODINGS)
        if settings.model.kind == "dynamics":
            of, forms = of.tracked(slots), [of.spec.dtype]  # as slotlab slots stores them
        made = make_plan(settings, of, place, forms, tower)
    show(made, preset, as_json)


def show(made: "Plan", preset: str, as_json: bool = False) -> None:
    """The plan on stdout: its table and its answer, or one JSON object."""
    from slotlab.commands import terminal

    if as_json:
        print_json({"preset": preset} | made.as_dict())
        return
    terminal.out.print(table(made, preset))
    terminal.out.print(made.answer, highlight=False)


def table(made: "Plan", preset: str) -> Any:
    """The plan's table, with a column for each stored form, and below it what it rests on."""
    from slotlab.commands.tables import plain_table
    from slotlab.planning.bound import LAUNCH, UTILISATION

    columns = (f"{preset}, batch {made.training[0].batch_size}", *(form.dtype for form in made.training))
    rows = [(name, *(show(form) for form in made.training)) for name, show in ROWS]
    rows.insert(1, ("frames and masks on disk, at most", *[_gigabytes(made.frame_bytes)] * len(made.training)))
    if (found := made.extraction) is not None:
        told = (
            f"{found.frames_per_s:.0f} frames/s, {found.hours:.2g} h, bound by {found.bound.by} ({found.precision}); "
            "decoding the videos left out"
        )
        rows.append((f"extraction by {found.backbone}", told, *[""] * (len(made.training) - 1)))
    shown = plain_table(columns, rows, f"{made.data.name} on {made.device.title}")
    shown.caption = (
        f"times: the bound of each operation (products, bytes, {1e6 * LAUNCH:.0f} µs a launch) over {UTILISATION}, "
        f"eager, {made.precision}\nfigures of the device: {made.device.source}"
    )
    shown.caption_justify = "left"
    return shown


def _gigabytes(size: int) -> str:
    from featcache.machine import readable

    return readable(size)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


ROWS: tuple[tuple[str, "Callable[[TrainingPlan], str]"], ...] = (
    ("tokens on disk", lambda form: _gigabytes(form.token_bytes)),
    ("where they live", lambda form: form.home.residence),
    ("  why", lambda form: form.home.why),
    ("memory of a step", lambda form: _gigabytes(form.cost.peak)),
    ("  of it parameters, gradients, optimiser", lambda form: _gigabytes(form.cost.state)),
    ("batches that are read ahead", lambda form: _gigabytes(form.ring)),
    ("largest batch", lambda form: str(form.largest_batch)),
    ("FLOPs of a step", lambda form: f"{form.cost.flops / 1e9:.1f} G"),
    ("bytes it reads and writes", lambda form: _gigabytes(form.cost.bytes)),
    ("operations", lambda form: str(form.cost.operations)),
    ("at least, by products", lambda form: _milliseconds(form.bound.compute)),
    ("at least, by the memory's rate", lambda form: _milliseconds(form.bound.memory)),
    ("at least, by launches", lambda form: _milliseconds(form.bound.launches)),
    ("at least, by its data", lambda form: f"{_milliseconds(form.data)} ({form.data_by})"),
    ("a step, as expected", lambda form: _milliseconds(form.seconds)),
    ("  bound by", lambda form: form.bound_by),
    ("frames/s", lambda form: f"{form.frames_per_s:.0f}"),
    ("an epoch", lambda form: f"{form.epoch_seconds:.3g} s"),
    ("all steps", lambda form: f"{form.hours:.2g} h ({form.steps})"),
)
