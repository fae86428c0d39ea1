"""Commands in the process of the tests: another Python takes seconds to start."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import cli


class Ended(NamedTuple):
    """A command that has run."""

    code: int
    out: str
    said: str  # on stderr, and what was logged

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Slotlab = Callable[..., Ended]


def call(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    *args: object,
) -> Ended:
    """``slotlab ARGS``, by its entry point."""
    before = signal.getsignal(signal.SIGTERM)  # which the entry point takes
    capsys.readouterr()
    caplog.clear()
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["slotlab", *map(str, args)])
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    said = err + "\n".join(record.getMessage() for record in caplog.records)
    assert "Traceback" not in said
    return Ended(int(ended.value.code or 0), out, said)
