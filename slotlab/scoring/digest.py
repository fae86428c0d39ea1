"""Which sources made some scores: numbers of other sources are not to be mixed with them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from featcache import moments
from featcache.store import encoding

# Files and rooms that decide numbers: what tokens are, what a configuration means, from tokens to masks, to scores.
DECIDE = (
    Path(moments.__file__),
    Path(encoding.__file__),
    *(Path(__file__).parent.parent / room for room in ("config", "models", "masks", "scoring")),
)


@cache
def scoring_code() -> str:
    """Digest of the sources that masks and scores come from."""
    return digest(DECIDE)


def digest(places: Iterable[Path]) -> str:
    """Of what files do, and all files below folders: comments, docstrings, descriptions of settings have no part."""
    found = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            name = file.relative_to(place.parent).as_posix()
            tree = _WithoutWords().visit(ast.parse(file.read_bytes(), str(file)))
            found.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()[:12]


class _WithoutWords(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """A string that stands alone is a docstring, or as good as one."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        return self.generic_visit(node)
