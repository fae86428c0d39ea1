"""Serves a report on this machine only, and refreshes it while its runs train.

The page asks for ``/state`` every other second. When a row is logged, it fetches ``/training``, the curves. When a
checkpoint is written, the server makes the whole page again in the background, and the open page reloads in place.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from featcache.errors import FeatcacheError, UsageError
from slotlab.report.gather import Say, gather, logged
from slotlab.report.options import PageOptions
from slotlab.report.page import render, render_training
from slotlab.runs import checkpoint
from slotlab.runs.folder import LOG, SUMMARY, read_rows
from slotlab.scoring.references import KnownReferences

HOST = "127.0.0.1"
LOOK_SECONDS = 1.0  # between two looks at the run folders
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass
class LiveReport:
    """The current page of some runs. One thread makes it; any number may read it."""

    runs: Sequence[Path]
    split: str | None = None
    cache: Path | None = None
    options: PageOptions = field(default_factory=PageOptions)
    device: torch.device | str = "cpu"
    say: Say = lambda _: None
    _page: str = ""
    _made_of: str = ""  # the checkpoints that the page shows
    _stop: threading.Event = field(default_factory=threading.Event)
    _known: KnownReferences = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = replace(self.options, live=True)

    def refresh(self) -> None:
        """Make the page again if the runs have new checkpoints. Errors are those of :func:`gather`."""
        seen = stamp(self.runs, f"{checkpoint.FOLDER}/{checkpoint.STATE}")
        if seen != self._made_of:
            gathered = gather(self.runs, self.split, self.cache, self.options, self.device, self.say, self._known)
            self._page, self._made_of = render(gathered, self.options), seen

    def follow(self) -> None:
        """Refresh until :meth:`stop`. A checkpoint that is just being replaced is read at the next look."""
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.refresh()
            except (FeatcacheError, OSError, ValueError) as error:
                self.say(f"not refreshed: {error}")

    def stop(self) -> None:
        """End :meth:`follow`."""
        self._stop.set()

    def page(self) -> str:
        """The latest page, as HTML."""
        return self._page

    def training(self) -> str:
        """The current curves, as HTML."""
        return render_training(logged(self.runs))

    def state(self) -> dict[str, Any]:
        """Stamps that the page compares to notice changes, and one line for its reader."""
        return {
            "page": self._made_of,
            "training": stamp(self.runs, LOG),
            "message": message(self.runs),
        }


def stamp(runs: Sequence[Path], file: str) -> str:
    """A text that changes whenever the file changes in one of the run folders."""
    parts = []
    for run in runs:
        try:
            found = (run / file).stat()
            parts.append(f"{found.st_mtime_ns}.{found.st_size}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


def message(runs: Sequence[Path]) -> str:
    """The progress of the runs, in one line."""
    steps = [rows[-1]["step"] if (rows := read_rows(run / LOG)) else 0 for run in runs]
    done = sum((run / SUMMARY).exists() for run in runs)
    if len(runs) == 1:
        return "finished" if done else f"step {steps[0]}"
    return f"{done} of {len(runs)} finished"


def serve(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server for ``report`` on the loopback address, not yet running. ``UsageError`` if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host not in (HOST, "localhost"):  # refuse other hosts' names that point here (DNS rebinding)
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            path = self.path.partition("?")[0]
            if path == "/":
                self.answer("text/html; charset=utf-8", report.page())
            elif path == "/training":
                self.answer("text/html; charset=utf-8", report.training())
            elif path == "/state":
                self.answer("application/json", json.dumps(report.state()))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def answer(self, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            with suppress(ConnectionError):  # the reader has left
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: the page asks every other second."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; name another, or 0 for any free one") from error
