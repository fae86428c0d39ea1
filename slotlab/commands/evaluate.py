"""slotlab eval: the scores of a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache.errors import IncompatibleError, UsageError
from slotlab.commands.options import Device, Json, print_json
from slotlab.words import Floors, Refinement

if TYPE_CHECKING:
    from slotlab.runs.loaded import LoadedRun
    from slotlab.scoring.follow import Followed


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    cache: Annotated[Path | None, typer.Option(help="Store of the same features, instead of the run's own.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to score; default: the configuration's, validation.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw: frames, ground truth and slots.")] = None,
    boundaries: Annotated[bool, typer.Option("--boundaries", help="Boundary F and bleeding as well, by area.")] = False,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Entropy of the soft masks as well, by material and by spare slots.")
    ] = False,
    refine: Annotated[
        Refinement | None,
        typer.Option(help="Method that refines masks along edges; these are then scored beside the plain ones."),
    ] = None,
    binarise: Annotated[
        list[str] | None, typer.Option(help="Binarisation to score as well: argmax, threshold=T, gumbel=T; repeatable.")
    ] = None,
    floors: Annotated[
        Floors, typer.Option(help="Floors to measure: usual, or all, which adds normalised cuts.")
    ] = "usual",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Published protocol to score by as well: dinosaur, spot, davis-unsupervised ..., or all."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Run to test this one against, video by video.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run: FG-ARI, ARI, mBO, mIoU by frame, video and material, beside a ceiling and floors."""
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.commands.protocols import protocols_table
    from slotlab.commands.splits import chosen_split
    from slotlab.commands.tables import entropy_table, gains_table, outlines_table, paired_table, scores_table
    from slotlab.dynamics.rollout import require_masks
    from slotlab.protocols.published import asked
    from slotlab.protocols.scorer import ProtocolScorer
    from slotlab.protocols.store import apply_all
    from slotlab.runs.folder import keep_result
    from slotlab.runs.loaded import load_run
    from slotlab.scoring.entropy import EntropyScorer
    from slotlab.scoring.evaluate import evaluate as run_evaluate
    from slotlab.scoring.fine import OutlineScorer
    from slotlab.scoring.paired import paired
    from slotlab.scoring.refined import Refined
    from slotlab.scoring.tables import count_labels, require_truth

    wanted = asked(protocol or ())
    if sheet and sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: is drawn as PNG; name a file that ends in .png")
    for each in (run, *([against] if against else [])):
        require_masks(each)
    loaded = load_run(run, cache, pick_device(device))
    chosen = require_truth(chosen_split(loaded, split))
    refined = Refined(chosen, refine) if refine else None
    also: list[Callable[[Followed], None]] = []
    if fine := boundaries or refine is not None or bool(binarise):
        outlines = OutlineScorer(loaded, chosen, refined, binarise or ())
        also.append(outlines.add)
    if entropy:
        entropies = EntropyScorer(chosen, count_labels(chosen))
        also.append(entropies.add)
    applied, left_out = apply_all(wanted, chosen)
    protocols = ProtocolScorer(chosen, applied, loaded.model.slots, refined)
    if applied:
        also.append(protocols.add)
    if sheet:
        from slotlab.pictures.sheet import draw_sheet
        from slotlab.pictures.still import Stills, pick_videos

        stills = Stills(pick_videos(chosen))
        also.append(stills.add)
    found = run_evaluate(loaded, chosen.name, also=also, floors=floors)
    if fine:
        found = replace(found, fine=outlines.result())
    if entropy:
        found = replace(found, fine={**found.fine, "entropy": entropies.result()})
    if wanted:
        told = protocols.result() | {name: {"left_out": why} for name, why in left_out.items()}
        found = replace(found, fine={**found.fine, "protocols": told})
    result = found.as_dict()
    terminal.warn(keep_result(run, loaded.store, result))
    if sheet:
        draw_sheet(chosen, stills.result(), sheet, entropy)
    compared = None
    if against is not None:
        compared = paired(found, run_evaluate(_other(against, loaded, cache), chosen.name))
    if as_json:
        print_json(result | ({"against": compared} if compared else {}))
    else:
        terminal.out.print(scores_table(found))
        terminal.warn(found.warnings)
        if fine:
            terminal.out.print(outlines_table(found), gains_table(found))
        if entropy:
            terminal.out.print(entropy_table(found))
        if wanted:
            terminal.out.print(protocols_table(found))
            terminal.warn([f"not scored: {line}" for line in left_out.values()])
        if compared:
            terminal.out.print(paired_table(compared))


def _other(run: Path, loaded: "LoadedRun", cache: Path | None) -> "LoadedRun":
    """The run to test against, on the store of ``--cache`` if that holds its features; else on its own store."""
    from slotlab.runs.loaded import load_run

    device = next(loaded.model.parameters()).device
    try:
        return load_run(run, cache, device)
    except IncompatibleError:  # the store holds other features
        return load_run(run, None, device)
