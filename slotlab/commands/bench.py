"""slotlab bench: measured rates beside what this machine allows."""

from __future__ import annotations

from typing import Annotated

import typer

from slotlab.commands.options import Cache, Device, Json, Residence, print_json

bench = typer.Typer(help="Measured rates beside what this machine allows.", no_args_is_help=True)


@bench.command("stream")
def bench_stream(
    cache: Cache,
    split: Annotated[str, typer.Option(help="Of the store.")] = "train",
    tap: Annotated[str | None, typer.Option(help="Default: the store's first.")] = None,
    residence: Annotated[Residence, typer.Option(help="Where the features live while they stream.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many.")] = 7,
    cold: Annotated[bool, typer.Option(help="Also from the disk: drops the store from the page cache.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Random clips and frames of a store: bare reads and whole stream, beside memory's and the disk's rate."""
    from featcache.bench import measure_stream
    from featcache.device import pick_device
    from featcache.store import FeatureStore
    from slotlab import display

    store = FeatureStore.open(cache)
    chosen = store[split].require_complete()
    rates = measure_stream(
        chosen, store.tap(tap), rounds=rounds, cold=cold, device=pick_device(device), residence=residence
    )
    if as_json:
        print_json({"cache": str(cache), "split": split, "patterns": [rate.as_dict() for rate in rates]})
        return
    rows = [
        (r.name, f"{r.bytes_per_s / 1e9:.2f}", f"{r.limit_bytes_per_s / 1e9:.2f}", f"{r.ratio:.2f}", r.limit)
        for r in rates
    ]
    display.out.print(display.plain_table(("pattern", "GB/s", "limit", "ratio", "the limit is"), rows, str(cache)))
    if cold and not any(rate.name.startswith("cold") for rate in rates):
        display.out.print("cold: not measured; another process holds the store in memory, or it must be decoded")
