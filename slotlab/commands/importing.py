"""slotlab import-run: a published checkpoint as a run."""

from pathlib import Path
from typing import Annotated

import typer

from slotlab.commands.options import Json, parse_size, print_json
from slotlab.words import ModelSource


def import_run(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint file, as its source saves it, or safetensors.")],
    source: Annotated[ModelSource, typer.Option("--from", help="Source of the checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME of the checkpoint.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting that no shape in the file tells, such as model.slots=7; repeatable."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Backbone that it was trained on; default: by the ViT in the checkpoint.")
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(help="Size of the backbone's input, 224x392; default: square, by the patches.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Store to use the run on; else name one to every command that reads one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a published checkpoint: VideoSAUR, SlotContrast, SPOT, DINOSAUR of OCLF. No code in it is run."""
    from slotlab.commands import terminal
    from slotlab.imported.importing import import_run as run_import

    size = parse_size("--input-size", input_size)
    found = run_import(
        checkpoint,
        source,
        out or Path("runs") / Path(checkpoint.name.removesuffix(".tar")).stem,
        overrides=override or (),
        backbone=backbone,
        input_size=(size, size) if isinstance(size, int) else size,
        cache=cache,
    )
    if as_json:
        wanted = {"backbone": found.wanted.backbone, "tap": found.config.data.tap, "extract": found.extract}
        print_json({"run": str(found.run), **found.origin, "assumed": found.assumed, **wanted})
        return
    told = ", ".join(f"{key} = {value}" for key, value in found.assumed.items())
    terminal.err.print(f"as in {found.origin['repository']}, for no shape tells it: {told}", highlight=False)
    if cache is None:
        next_one = f"{found.extract}, then slotlab eval {found.run} --cache STORE"
    else:
        next_one = f"slotlab eval {found.run}"
    terminal.out.print(f"{found.run}: imported, for {found.wanted.backbone}. Next: {next_one}", highlight=False)
