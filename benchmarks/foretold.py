"""What ``slotlab plan`` says of the work that benchmarks.gpu measures.

    python -m benchmarks.foretold --cache STORE [--device cuda] [PRESET:BATCH:PRECISION[:KEY=VALUE ...] ...]

A JSON object a line, each as soon as it is known: the device, the stream from each residence, the extraction, and a
step of each training. A card that a plan knows has the figures of its data sheet, any other device those measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESIDENCES = ("disk", "host", "device")
DEVICE, EXTRACTION = "device", "extraction"  # keys of lines


def stream_key(residence: str) -> str:
    return f"stream from {residence}"


@dataclass(frozen=True)
class Training:
    """Steps of a preset, with some of its settings changed."""

    preset: str
    batch_size: int
    precision: str
    changed: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        return (f"optim.precision={self.precision}", *self.changed)

    @property
    def key(self) -> str:
        return ":".join([self.preset, str(self.batch_size), self.precision, *self.changed])

    @classmethod
    def of_key(cls, key: str) -> Training:
        preset, batch_size, precision, *changed = key.split(":")
        return cls(preset, int(batch_size), precision, tuple(changed))


def foretold(cache: Path, device_name: str, trainings: list[Training]) -> Iterator[dict[str, Any]]:
    """Rates are a second; the stream's count tokens as float16, as ``slotlab bench stream`` does."""
    from featcache.backbones.backbone import outline
    from featcache.machine import pick_device
    from featcache.store.reading import FeatureStore
    from slotlab.config.load import load_config
    from slotlab.planning.data import DataSet
    from slotlab.planning.devices import DISK, present
    from slotlab.planning.extraction import plan_extraction
    from slotlab.planning.plan import make_plan

    store = FeatureStore.open(cache)
    data = DataSet.of_store(store)
    device = present(pick_device(device_name), *{training.precision for training in trainings})
    yield {"key": DEVICE, "title": device.title, "source": device.source}

    tap = next(iter(store.spec.taps))
    of = store.spec.taps[tap]
    stored = sum(array.bytes for array in data.formats(store.splits[0], tap, (1, 1))[0])
    as_float16 = of.patches * of.dim * 2 / stored
    for residence in RESIDENCES:
        # From the page cache: the disk itself is asked for cold. Resident features are read and written again.
        rates = {name: rate for name, rate in device.arrival(residence).items() if name != "disk"}  # type: ignore[arg-type]
        rate = min(rates.values(), default=device.bandwidth / 2)
        yield {"key": stream_key(residence), "bytes_per_s": rate * as_float16, "cold_bytes_per_s": DISK}

    extraction = plan_extraction(outline("dinov2"), 1, device)
    yield {"key": EXTRACTION, "frames_per_s": extraction.frames_per_s, "bound_by": extraction.bound.by}

    for training in trainings:
        config = load_config(training.preset, None, training.settings, optim__batch_size=training.batch_size)
        plan = make_plan(config, data, device, [store.spec.dtype], largest=False).training[0]
        resident = plan.stream_bytes if plan.home.residence == "device" else 0
        yield {
            "key": training.key,
            "seconds": plan.seconds,
            "frames_per_s": plan.frames_per_s,
            "memory_bytes": plan.cost.peak + plan.ring + resident,
            "bound_by": plan.bound_by,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("trainings", nargs="*", type=Training.of_key)
    args = parser.parse_args()
    for line in foretold(args.cache, args.device, args.trainings):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
