"""Real text that every machine with Python has: the docstrings of its standard library."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST = 60  # characters: below it, mostly "Return the name."
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Passage:
    """A docstring and the dotted name of what it describes."""

    name: str
    text: str


def standard_library_passages(count: int) -> list[Passage]:
    """``count`` docstrings spread evenly over the standard library, the same ones for one version of Python.

    >>> len(standard_library_passages(100))
    100
    """
    found = sorted(_all_docstrings(), key=lambda passage: passage.name)
    unique = list({passage.text: passage for passage in found}.values())
    if count > len(unique):
        raise ValueError(f"count is {count}; this standard library has {len(unique)} docstrings")
    return [unique[index * len(unique) // count] for index in range(count)]


def _all_docstrings() -> Iterator[Passage]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        files = [root / f"{module}.py"] if (root / f"{module}.py").exists() else sorted((root / module).rglob("*.py"))
        for path in files:
            parts = path.relative_to(root).with_suffix("").parts
            # Left out: tests, which distributions package apart, and packages that pip put beside the library.
            if not any("test" in part or part == "site-packages" for part in parts):
                name = ".".join(parts).removesuffix(".__init__")
                yield from _docstrings(ast.parse(path.read_bytes()), name)


def _docstrings(node: ast.AST, name: str) -> Iterator[Passage]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST:
            yield Passage(name, text)
        for child in node.body:
            if isinstance(child, DEFINITIONS):
                yield from _docstrings(child, f"{name}.{child.name}")
