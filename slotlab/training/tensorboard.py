"""Writes logged rows as TensorBoard events (the extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from featcache.errors import UsageError


@contextmanager
def events(run: Path, resume: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes the numbers of a logged row to ``RUN/tensorboard``. ``UsageError`` without the extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard: not installed; pip install 'slotlab[tensorboard]'") from error
    from slotlab.runs import checkpoint

    # Steps after the checkpoint are trained again, so drop their events.
    purge = checkpoint.state(run)["step"] + 1 if resume and checkpoint.exists(run) else None
    with ExitStack() as stack:
        writer: SummaryWriter | None = None  # opened by the first row, so that a run that is refused leaves no folder

        def write(row: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = stack.enter_context(SummaryWriter(str(run / "tensorboard"), purge_step=purge))
            for name, value in row.items():
                if isinstance(value, float):
                    group, _, rest = name.partition("eval_")
                    writer.add_scalar(f"eval/{rest}" if rest else f"train/{group}", value, row["step"])

        yield write
