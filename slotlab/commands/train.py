"""slotlab train: a run on a store."""

from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.errors import DataError, UsageError
from slotlab.commands.options import Device

NEXT = {"dynamics": "rollout {run}", "dense": "rollout WORLD --dense {run}"}  # the command after training, by kind


def train(
    context: typer.Context,
    cache: Annotated[
        Path | None, typer.Option(help="Store made by slotlab extract, or export --for-ranks.", show_default=False)
    ] = None,
    run_of: Annotated[
        Path | None,
        typer.Option("--run", help="Run whose slots are predicted (--preset dynamics), in place of a store."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Name of a shipped configuration.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over the preset.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Setting as key=value, for example model.slots=7; repeatable.")
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(help="Normalisation: slow=K, whiten, whiten=K, channel, scale, none ...")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in a step: frames, or clips.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default: the configuration's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/NAME-PRESET-SEED, NAME of the store or run.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continuation of the run from its checkpoint.")] = False,
    init_from: Annotated[Path | None, typer.Option(help="Run whose parameters training starts from.")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Events for TensorBoard, written to RUN/tensorboard.")
    ] = False,
    device: Device = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Plan alone: memory and time that it would take.")] = False,
) -> None:
    """Train a slot model on cached features. Runs on several GPUs under: torchrun --nproc-per-node N -m cli train."""
    from slotlab.config.load import load_config

    settings = load_config(
        preset,
        config,
        override or (),
        data__normalize=normalize,
        optim__steps=steps,
        optim__batch_size=batch_size,
        seed=seed,
    )
    from featcache.machine import chosen, pick_device
    from featcache.store.reading import FeatureStore
    from featcache.upkeep.ranks import own_store
    from slotlab.commands import terminal
    from slotlab.config.model import DynamicsConfig
    from slotlab.models.inputs import Tracks
    from slotlab.training.processes import count, is_leader, rank
    from slotlab.training.train import train as run_train

    cache = _store(cache, run_of, settings.model.kind, device)
    name = cache.stem if run_of is None else run_of.resolve().name
    run = out or Path("runs") / f"{name}-{preset}-{settings.seed}"
    store, place = FeatureStore.open(own_store(cache, rank(), count())), pick_device(device)
    for idle in settings.unread() if is_leader() else ():
        terminal.err.print(f"note: {idle}")
    predicts = isinstance(settings.model, DynamicsConfig) and settings.model.refined
    if predicts and is_leader() and not Tracks.in_store(store).refined:
        without = "tracks of an earlier version, without places by the frames' edges; those of the masks are read"
        terminal.err.print(f"note: {store.path}: {without} (slotlab slots RUN --out NEW measures them)")
    if settings.optim.precision == "bfloat16" and place.type == "cpu" and is_leader():
        from slotlab.commands.doctor import bfloat16_speed, bfloat16_verdict

        if (speed := bfloat16_speed()) < 1:
            warning = f"warning: optim.precision=bfloat16 has {bfloat16_verdict(speed)}"
            terminal.err.print(warning, style="yellow")
    if plan:
        if is_leader():
            from slotlab.commands.plan import show
            from slotlab.planning.data import DataSet
            from slotlab.planning.devices import measured
            from slotlab.planning.plan import make_plan

            here, data = measured(place, settings.optim.precision), DataSet.of_store(store, count())
            show(make_plan(settings, data, here, [store.spec.dtype]), preset)
        return
    shown = [context.with_resource(terminal.training_display(settings.optim.steps))]
    if tensorboard:
        from slotlab.training.tensorboard import events

        shown.append(context.with_resource(events(run, resume)))

    def tell(row: dict[str, Any]) -> None:
        for each in shown:
            each(row)

    def remark(line: str) -> None:
        for each in (chosen(place), line):
            terminal.err.print(each, highlight=False)

    run_train(settings, store, run, resume=resume, init_from=init_from, device=place, report=tell, remark=remark)
    if is_leader():
        then = NEXT.get(settings.model.kind, "eval {run}").format(run=run)
        terminal.out.print(f"{run}: trained. Next: slotlab {then}")


def _store(cache: Path | None, run: Path | None, kind: str, device: str) -> Path:
    """The store to train on: the one named, or the tracks of a run, which are made where they are not there yet."""
    if (cache is None) == (run is None):
        raise UsageError("name a store with --cache, or, for --preset dynamics, a run with --run")
    if cache is not None:
        return cache
    assert run is not None
    if kind != "dynamics":
        raise UsageError(f"--run {run}: only a world model is trained on a run's slots; add --preset dynamics")
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.dynamics.tracks import make_tracks
    from slotlab.runs.folder import tracks_path
    from slotlab.runs.loaded import load_run
    from slotlab.training.processes import count

    place = tracks_path(run)
    if count() > 1:  # one process writes a store
        if not place.exists():
            raise DataError(f"{run}: its slots are not stored yet; first run: slotlab slots {run}")
    else:
        with terminal.ExtractProgress() as progress:
            make_tracks(load_run(run, None, pick_device(device)), place, progress)
    return place
