"""slotlab settings: the keys of a configuration."""

from typing import Annotated

import typer

from slotlab.commands.options import Json, print_json


def settings(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys or sections, such as model.decoder; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every key of --set and --config: its values, default, meaning, and the presets that set it. Prints Markdown."""
    from slotlab.commands import terminal
    from slotlab.config.reference import HEAD, markdown
    from slotlab.config.reference import settings as reference

    found = reference(keys or ())
    if as_json:
        print_json({"settings": [setting.as_dict() for setting in found]})
        return
    text = ("" if keys else HEAD) + markdown(found)
    if terminal.out.is_terminal:
        from rich.markdown import Markdown

        terminal.out.print(Markdown(text))
    else:
        print(text)
