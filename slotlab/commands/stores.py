"""Commands about stores, weights and the machine: verify, export, import, weights, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from featcache.errors import DataError
from slotlab.commands.options import Device, Dtype, Json, print_json


def verify(
    cache: Annotated[Path, typer.Argument(help="Store to check.")],
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged, and only that.")] = False,
    data: Annotated[str | None, typer.Option(help="Where the store's videos are now, if they have moved.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file, if it has moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check all of a store against its manifest; names the damaged videos, exit code 3 if any are left."""
    from featcache.device import pick_device
    from featcache.verify import verify as run_verify
    from slotlab import display

    damage, repaired = run_verify(cache), []
    if damage and repair:
        from featcache.repair import Means
        from featcache.repair import repair as run_repair

        with display.ExtractProgress() as progress:
            repaired = run_repair(cache, Means(data, weights, device=str(pick_device(device))), progress)
        damage = run_verify(cache)
    if as_json:
        lists = {"damaged": damage, "repaired": repaired}
        print_json({"path": str(cache), **{k: [d.as_dict() for d in v] for k, v in lists.items()}})
    elif damage:
        display.out.print(display.plain_table(("split", "video", "id", "what"), [d.row() for d in damage], str(cache)))
    else:
        display.out.print(f"{cache}: sound" + (f", {len(repaired)} damages repaired" if repaired else ""))
    if damage:
        raise typer.Exit(DataError.exit_code)


def export(
    cache: Annotated[Path, typer.Argument(help="Store to copy.")],
    out: Annotated[Path, typer.Argument(help="Store or file to make.")],
    form: Annotated[Literal["zarr", "hdf5"], typer.Option("--format", help="Of the copy.")] = "zarr",
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as it is.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every split.")] = None,
    shard_videos: Annotated[int, typer.Option(help="Videos that share a file, where inodes are scarce.")] = 0,
) -> None:
    """Copy a store in another dtype, with fewer taps, in shards, or as HDF5. Never loads it; checks as it reads."""
    from featcache.convert import ConvertOptions, convert
    from slotlab import display

    options = ConvertOptions(dtype, tuple(tap or ()), tuple(split or ()), shard_videos)
    with display.ExtractProgress() as progress:
        convert(cache, out, options, form, progress)
    display.out.print(f"{out}: written")


def import_file(
    file: Annotated[Path, typer.Argument(help="HDF5 file by slotlab export, or of the layout in docs/store.md.")],
    out: Annotated[Path, typer.Argument(help="Store to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as it is.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every split.")] = None,
    shard_videos: Annotated[int, typer.Option(help="Videos that share a file, where inodes are scarce.")] = 0,
) -> None:
    """Make a store of the features in an HDF5 file."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; name an HDF5 file, or copy a store with slotlab export")
    export(file, out, "zarr", dtype, tap, split, shard_videos)


def weights(
    fetch: Annotated[str | None, typer.Option(help="Download this backbone's weights now; prints JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Which backbones there are, and where each one's weights come from."""
    from featcache.registry import ALIASES, get_spec, list_backbones
    from slotlab import display

    if fetch:
        from featcache.weights import resolve_weights

        found = resolve_weights(get_spec(fetch))
        print_json({"backbone": fetch, "origin": found.origin, "sha256": found.sha256})
        return
    short = {name: alias for alias, name in ALIASES.items()}
    rows = [
        (s.name + (f" ({short[s.name]})" if s.name in short else ""), s.library, s.model_id, s.patch, s.dim, s.source)
        for s in list_backbones()
    ]
    if as_json:
        keys = ("name", "library", "model_id", "patch", "dim", "source")
        print_json({"backbones": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        display.out.print(display.plain_table(("backbone", "library", "model", "patch", "dim", "weights"), rows))


def doctor(as_json: Json = False) -> None:
    """What this machine offers: packages, devices, disk, where weights are kept, the embedded sample."""
    from slotlab import display
    from slotlab.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        display.out.print(display.plain_table(("", "found"), [(k, str(v)) for k, v in findings.items()]))
