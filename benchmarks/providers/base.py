"""What a provider is: a library that computes attention, or the reason why it is not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.timing import Clock
from benchmarks.workloads import Cell


class Unavailable(Exception):
    """The library is not installed, or not for this machine; the message says which."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One library on the arrays of one cell: what is timed, and how its results become canonical arrays.

    ``forward`` and ``backward`` take nothing and return the library's own arrays; a backward works from a forward
    pass made beforehand, so that it is timed alone. ``outputs`` and ``gradients`` turn what they return into
    ``{"out": ...}`` and ``{"dq": ..., "dk": ..., "dv": ...}``, canonical (batch, seqlen, heads, head_dim).
    """

    forward: Callable[[], object]
    backward: Callable[[], object] | None
    outputs: Callable[[object], dict]
    gradients: Callable[[object], dict]


class Provider:
    """A library under its name in the tables.

    Subclasses say which cells they take; ``bind`` may do anything slow (imports, compilation), the calls it returns
    must not.
    """

    name: str
    device = "gpu"  # gpu | cpu
    packages: tuple[str, ...] = ()  # whose versions the record of a run keeps

    def load(self) -> None:
        """Import the library; raises `Unavailable`."""

    def clock(self) -> Clock:
        """A fresh clock for the calls of one cell."""
        raise NotImplementedError

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        """Why a pass of a cell is not measured; None where it is."""
        raise NotImplementedError

    def gate_cell(self, cell: Cell) -> Cell:
        """The cell that the correctness gate checks; another where a library's own random bits cannot be known."""
        return cell

    def bind(self, cell: Cell, arrays: dict) -> Bound:
        raise NotImplementedError


def missing_feature(cell: Cell, features: tuple[str, ...], *, window: bool = False) -> str | None:
    """Reason where the cell's mask or feature is none of those named (by prefix: "dropout" takes dropout0.1)."""
    if cell.feature != "plain" and not cell.feature.startswith(features):
        return f"has no {cell.feature.rstrip('0123456789.')}"
    if cell.window_left is not None and not window:
        return "has no window"
    return None


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
