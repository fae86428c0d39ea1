"""``python -m cli`` and ``torchrun -m cli``: the ``slotlab`` command from a checkout."""

from typing import Any

from slotlab.commands.start import main


def __getattr__(name: str) -> Any:
    """``app``, which takes a moment to import."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slotlab.commands.app import app

    return app


if __name__ == "__main__":
    main()
