"""What every section of the configuration is: closed, typed, and able to say which of its settings have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

ReadBy = Mapping[str, tuple[str, tuple[str, ...]]]


class Gone(NamedTuple):
    """A setting of earlier versions: its values that match what this version does, and what became of it.

    ``differs`` is a sentence for those who load a run with such a value, where masks are not quite those of then.
    """

    values: tuple[Any, ...]
    now: str
    differs: str = ""

    @classmethod
    def fixed(cls, value: Any) -> Gone:
        return cls((value,), f"is fixed at {value} now")


class Section(BaseModel):
    """A frozen, closed section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # Key -> another key of the section, and the values of that other key with which the first has an effect.
    read_by: ClassVar[ReadBy] = {}
    gone: ClassVar[Mapping[str, Gone]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values: Any) -> Any:
        """Drop settings of earlier versions with their fixed values; other values stay, and are refused as unknown."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if key not in cls.gone or value not in cls.gone[key].values}

    def chosen(self, key: str) -> str:
        """The value of a key in the form that :attr:`read_by` uses."""
        return str(getattr(self, key))

    def unread(self, where: str = "") -> list[str]:
        """A sentence for each changed setting without effect; ``where`` is the section's key with a dot at its end."""
        found = []
        for name, (deciding, values) in self.read_by.items():
            chosen = self.chosen(deciding)
            given, default = getattr(self, name), type(self).model_fields[name].default
            if given != default and chosen not in values:
                found.append(f"{where}{name} = {given} has no effect with {where}{deciding} = {chosen}")
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Section):
                found += part.unread(f"{where}{name}.")
        return found
