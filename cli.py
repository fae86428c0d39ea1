"""``python -m cli`` and ``torchrun -m cli``: the ``slotlab`` command from a checkout."""

from slotlab.commands.app import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
