"""A digest of the source code that makes scores, so that numbers of different code are not mixed."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from featcache import moments
from featcache.store import encoding

# Files and folders whose code decides scores: statistics and encoding of tokens, configuration, models, masks, scoring,
# rollouts.
DECIDE = (
    Path(moments.__file__),
    Path(encoding.__file__),
    *(
        Path(__file__).parent.parent / room
        for room in ("config", "models", "masks", "scoring", "protocols", "dynamics")
    ),
)


@cache
def scoring_code() -> str:
    """Digest of the code that masks and scores come from: 12 hex digits."""
    return digest(DECIDE)


def digest(places: Iterable[Path]) -> str:
    """Digest of the code in files and folders, without comments, docstrings and descriptions of settings."""
    found = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            name = file.relative_to(place.parent).as_posix()
            tree = _WithoutWords().visit(ast.parse(file.read_bytes(), str(file)))
            found.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return found.hexdigest()[:12]


class _WithoutWords(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Drop strings that stand alone: docstrings, or strings without effect."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        return self.generic_visit(node)
