"""The ``slotlab`` command: its subcommands, and the way errors are shown."""

import io
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from featcache.errors import INTERRUPTED, DataError, FeatcacheError, is_full, out_of_memory
from featcache.text import printable
from slotlab.commands import (
    bench,
    demo,
    doctor,
    evaluate,
    experiments,
    extract,
    importing,
    masks,
    plan,
    report,
    robustness,
    rollout,
    settings,
    slots,
    stores,
    train,
)

app = typer.Typer(
    name="slotlab",
    help="Object-centric learning on frozen features: extract once, then stream, train, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Traceback of an error, not only its message.")] = False,
) -> None:
    os.environ["SLOTLAB_DEBUG"] = "1" if debug else os.environ.get("SLOTLAB_DEBUG", "")


app.command()(extract.extract)
app.command()(stores.stats)
app.command()(train.train)
app.command()(plan.plan)
app.command()(settings.settings)
app.command("eval")(evaluate.evaluate)
app.command()(demo.demo)
app.command()(stores.verify)
app.command()(stores.export)
app.command("import")(stores.import_file)
app.command()(importing.import_run)
app.command()(stores.weights)
app.command()(doctor.doctor)
app.command()(masks.masks)
app.command()(masks.segment)
app.command()(robustness.robustness)
app.command()(slots.slots)
app.command()(rollout.rollout)
app.command()(report.report)
app.command()(report.view)
app.command()(experiments.compare)
app.command()(experiments.ablate)
app.command()(experiments.table)
app.add_typer(bench.bench, name="bench")


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _OneLine(logging.Formatter):
    """Warnings name files, whose names may break a line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=record.exc_info is not None)


def _of_the_machine(error: Exception) -> str | None:
    """The message for lack of memory, or for a file that cannot be read or written; None for other errors."""
    if out_of_memory(error):
        pinned = "CUDA error" in str(error)  # not one of torch's own allocations
        which = " (page-locked, perhaps: --set data.residence=device needs less)" if pinned else ""
        remedy = "take a smaller --batch-size, or --set optim.accumulate=2 or more (extract: fewer --workers)"
        return f"out of memory{which}; {remedy}"
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        remedy = "free space" if is_full(error) else "check the path and its permissions, or name another"
        return printable(f"{what}; {remedy}")
    return None


def main() -> None:
    """Entry point: user errors become one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    try:
        code = app(standalone_mode=False)  # None, or the code of an exit; 130 for Ctrl-C in newer typers
        sys.stdout.flush()  # while a full disk behind it can still be told
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        said = "interrupted; finished work is kept, and the same command resumes (train: with --resume)"
        print(f"slotlab: {said}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except FeatcacheError as error:
        if os.environ.get("SLOTLAB_DEBUG"):
            raise
        print(f"slotlab: {error.render()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if (told := _of_the_machine(error)) and not os.environ.get("SLOTLAB_DEBUG"):
            print(f"slotlab: {told}", file=sys.stderr)
            try:
                sys.stdout.flush()
            except OSError:  # Python would try once more at its end, and say so
                with suppress(OSError):
                    sys.stdout.close()
            sys.exit(DataError.exit_code)
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):  # an error of click, wherever typer keeps it
            raise
        error.show()
        sys.exit(error.exit_code)
