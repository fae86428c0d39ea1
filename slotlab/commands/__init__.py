"""The command line: the only package that uses typer and rich.

Modules of commands have no ``from __future__ import annotations``: typer would evaluate each option's annotation from a
string, a tenth of the time that ``slotlab --help`` takes.
"""
