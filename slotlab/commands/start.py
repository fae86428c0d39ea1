"""Where the program begins: Ctrl-C is one line and its exit code even while modules are still being imported."""

from __future__ import annotations

import sys

from featcache.errors import INTERRUPTED


def main() -> None:
    """Entry point."""
    try:
        from slotlab.commands.app import main as run  # takes a moment

        run()
    except KeyboardInterrupt:
        print("slotlab: interrupted before it began", file=sys.stderr)
        sys.exit(INTERRUPTED)
