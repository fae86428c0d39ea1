"""slotlab bench: measured rates beside this machine's limits."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache.text import bytes_text
from featcache.words import Residence
from slotlab.commands.options import Cache, Device, Json, Precision, parse_size, print_json

if TYPE_CHECKING:
    from slotlab.training.speed import TrainingRate

bench = typer.Typer(help="Measured rates beside the limits of this machine.", no_args_is_help=True)


@bench.command("stream")
def bench_stream(
    cache: Cache,
    split: Annotated[str | None, typer.Option(help="Split to read; default: train, or the first.")] = None,
    tap: Annotated[str | None, typer.Option(help="Tap to read; default: the store's first.")] = None,
    residence: Annotated[Residence, typer.Option(help="Place of the features while they stream.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds (medians are reported).")] = 7,
    batches: Annotated[int, typer.Option(min=1, help="Batches that a turn reads.")] = 6,
    cold: Annotated[
        bool, typer.Option(help="Cold reads as well, after dropping the store from the page cache.")
    ] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Random clips and frames of a store: bare reads and the whole stream, beside the rates of memory and disk."""
    from featcache.bench.stream import measure_stream
    from featcache.machine import pick_device
    from featcache.store.reading import FeatureStore
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    store = FeatureStore.open(cache)
    chosen = store.split(split).require_complete()
    rates = measure_stream(
        chosen,
        store.tap(tap),
        rounds=rounds,
        batches=batches,
        cold=cold,
        device=pick_device(device),
        residence=residence,
    )
    if as_json:
        print_json({"cache": str(cache), "split": chosen.name, "patterns": [rate.as_dict() for rate in rates]})
        return
    rows = [
        (r.name, f"{r.bytes_per_s / 1e9:.2f}", f"{r.limit_bytes_per_s / 1e9:.2f}", f"{r.ratio:.2f}", r.limit)
        for r in rates
    ]
    terminal.out.print(plain_table(("pattern", "GB/s", "limit", "ratio", "the limit is"), rows, str(cache)))
    if cold and not any(rate.name.startswith("cold") for rate in rates):
        terminal.out.print("cold: not measured; another process maps the store, or its chunks must be decoded")


@bench.command("extract")
def bench_extract(
    backbone: Annotated[str, typer.Option(help="Backbone: a short name, timm:NAME or open_clip:ARCH/TAG.")] = "dinov2",
    data: Annotated[
        str | None, typer.Option(help="Source of videos: a folder, a file or LAYOUT:PATH; default: the sample.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to read; default: the source's first.")] = None,
    videos: Annotated[int, typer.Option(min=1, help="Number of videos in a round.")] = 6,
    frame_stride: Annotated[int, typer.Option(min=1, help="Every so many frames of them.")] = 1,
    weights: Annotated[str | None, typer.Option(help="Weights of the backbone: a checkpoint file, or random.")] = None,
    input_size: Annotated[
        str | None, typer.Option(help="Size of the backbone's input in pixels: a side, or rows x columns as 224x392.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Number of frames at a time; default: as in extract.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Number format of the backbone; auto: as in extract.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds (medians are reported).")] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Extraction, from the source to a finished store, beside the bare model on images that are ready."""
    from featcache.backbones.backbone import load_backbone
    from featcache.bench.extraction import measure_extract
    from featcache.extraction.plan import ExtractOptions
    from featcache.machine import machine, pick_device
    from featcache.sources import Reading, open_source
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    source = open_source(data)
    if source.question():
        source = open_source(data, Reading(frames_as="images"))  # what they are matters little to the rate
    model = load_backbone(backbone, weights, (), parse_size("--input-size", input_size), pick_device(device))
    options = ExtractOptions(
        splits=(split or source.splits()[0],),
        frame_stride=frame_stride,
        max_videos=videos,
        batch_size=batch_size,
        precision=precision,
    )
    rate = measure_extract(source, model, options, rounds)
    if as_json:
        print_json({"backbone": model.spec.name, "machine": machine(), "patterns": [rate.as_dict()]})
        return
    row = (rate.name, rate.batch_size, rate.precision, rate.frames_per_s, rate.limit_frames_per_s, rate.ratio)
    columns = ("pattern", "batch", "precision", "frames/s", "limit", "ratio")
    terminal.out.print(plain_table(columns, [row], f"the limit is {rate.limit}"))


@bench.command("train")
def bench_train(
    cache: Cache,
    preset: Annotated[str, typer.Option(help="Name of a shipped configuration.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over the preset.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Setting as key=value, for example model.slots=7; repeatable.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Samples in a step; repeatable; default: the configuration's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps in a turn.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds (medians are reported).")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Training steps from a store: their rate, what bounds them (data, copy, compute), FLOPs and memory."""
    from slotlab.config.load import load_config

    settings = [load_config(preset, config, override or (), optim__batch_size=size) for size in batch_size or (None,)]
    from featcache.machine import machine, pick_device
    from featcache.store.reading import FeatureStore
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table
    from slotlab.training.speed import DoesNotFit, measure_training

    store, chosen = FeatureStore.open(cache), pick_device(device)
    rates: list[TrainingRate | DoesNotFit] = []
    for setting in settings:
        try:
            rate = measure_training(setting, store, chosen, steps=steps, rounds=rounds)
        except DoesNotFit as error:
            rates.append(error)
            terminal.err.print(str(error))
        else:
            rates.append(rate)
            terminal.err.print(f"{rate.name}: {rate.samples_per_s:.1f} samples/s, bound by {rate.bound}")
    too_large = [rate for rate in rates if isinstance(rate, DoesNotFit)]
    if too_large == rates:
        raise too_large[0]
    if as_json:
        patterns = [rate.as_dict() for rate in rates]
        print_json({"cache": str(cache), "preset": preset, "machine": machine(), "patterns": patterns})
        return
    columns = ("", *(rate.name for rate in rates))
    rows = [
        (name, *(absent if isinstance(rate, DoesNotFit) else show(rate) for rate in rates))
        for (name, show), absent in zip(TRAINING_ROWS, ("does not fit", *[""] * len(TRAINING_ROWS)), strict=False)
    ]
    terminal.out.print(plain_table(columns, rows, f"{cache}, {preset}"))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _size(value: int | None) -> str:
    return "–" if value is None else bytes_text(value)


TRAINING_ROWS: tuple[tuple[str, "Callable[[TrainingRate], str]"], ...] = (
    ("samples/s", lambda r: f"{r.samples_per_s:.1f}"),
    ("frames/s", lambda r: f"{r.frames_per_s:.1f}"),
    ("  of the rate on resident data", lambda r: _share(r.ratio)),
    ("waiting for data", lambda r: _share(r.wait_share)),
    ("the step on resident data", lambda r: _milliseconds(r.seconds.compute)),
    ("reading a batch", lambda r: _milliseconds(r.seconds.data)),
    ("copying it to the device", lambda r: _milliseconds(r.seconds.copy)),
    ("bound by", lambda r: r.bound),
    ("FLOPs a step", lambda r: f"{r.flops_per_step / 1e9:.2f} G"),
    ("FLOPs a second", lambda r: f"{r.flops_per_s / 1e9:.1f} G"),
    ("  of the matrix product's", lambda r: f"{r.flop_utilisation:.1%} ({r.precision})"),
    ("peak memory", lambda r: _size(r.peak_memory_bytes)),
    ("GPU busy", lambda r: _share(r.gpu_utilisation)),
    ("GPU memory in use", lambda r: _size(r.gpu_memory_bytes)),
)
