"""Time what could be beside what is: other rows of the tile tables, and kernels with a line changed.

    PYTHONPATH=. python -m benchmarks.variants --rounds 3                     # every open question
    PYTHONPATH=. python -m benchmarks.variants --questions 'scores early'

A question names cells, a prediction and variants; `variants.json` keeps those that are open. Every variant passes the
same gate as a library, runs in the same rounds as what the planner chooses, and leaves rows in `results/variants.csv`.
The answer, with the prediction beside it, belongs in NOTES.md, and the question then out of the file.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.progress import track

import cuflash.plan_sm90
import cuflash.planner
from benchmarks import record
from benchmarks.providers import PROVIDERS, Bound
from benchmarks.providers.ours import Cuflash
from benchmarks.run import CellBench, CellResult, describe, release_memory
from benchmarks.workloads import Cell, select
from cuflash import dispatch
from cuflash.backends import cuda_backend
from cuflash.cuda import module
from cuflash.cuda.source import translation_unit
from cuflash.plan import KernelSpec

QUESTIONS = Path(__file__).with_name("variants.json")
COLUMNS = (
    *("date", "gpu", "driver", "nvrtc", "run", "pass", "head_dim", "seqlen", "mask", "dropout_p"),
    *("variant", "ms_median"),
)
CHOICES = {  # what a planner asks for a row, or for a number, by name
    "row_for": cuflash.planner,
    "forward_row": cuflash.plan_sm90,
    "backward_row": cuflash.plan_sm90,
    "queries_row": cuflash.plan_sm90,
    "packed_heads": cuflash.plan_sm90,
}


@dataclass(frozen=True)
class Change:
    """How a variant differs from what the planner and the kernels do.

    ``rows`` gives fields of chosen rows other values, by the name of the choice, or replaces a chosen number;
    ``edits`` are (before, after) in the text of kernels that have all of them, each exactly once.
    """

    rows: Mapping[str, Mapping[str, object] | int] = field(default_factory=dict)
    edits: Sequence[tuple[str, str]] = ()

    def edited(self, spec: KernelSpec) -> str:
        text = translation_unit(spec)
        counts = [text.count(before) for before, _ in self.edits]
        if not any(counts):
            return text
        if set(counts) != {1}:
            raise ValueError(f"the edits occur {counts} times in {spec.source}; each must occur once")
        for before, after in self.edits:
            text = text.replace(before, after)
        return text

    @contextmanager
    def applied(self, calls: dict, launches: dict, kernels: dict) -> Iterator[None]:
        """Plan, compile and launch in this way, with caches of its own, for as long as the context lasts."""

        def chosen(name: str, choose: Callable[..., object]) -> Callable[..., object]:
            change = self.rows[name]
            return lambda *args, **keywords: (
                replace(choose(*args, **keywords), **change) if isinstance(change, Mapping) else change
            )

        with ExitStack() as stack:
            for name in self.rows:
                planner = CHOICES[name]
                stack.enter_context(mock.patch.object(planner, name, chosen(name, getattr(planner, name))))
            stack.enter_context(mock.patch.object(dispatch, "_prepared", calls))
            stack.enter_context(mock.patch.object(cuda_backend, "_launches", launches))
            stack.enter_context(mock.patch.object(module, "_kernels", kernels))
            stack.enter_context(mock.patch.object(module, "translation_unit", self.edited))
            yield


class Variant(Cuflash):
    """cuflash with one change."""

    def __init__(self, name: str, change: Change):
        super().__init__(name)
        self._change, self._caches = change, ({}, {}, {})

    def bind(self, cell: Cell, arrays: dict) -> Bound:
        bound = super().bind(cell, arrays)
        return replace(bound, forward=self._changed(bound.forward), backward=self._changed(bound.backward))

    def _changed(self, call: Callable[[], object]) -> Callable[[], object]:
        def changed() -> object:
            with self._change.applied(*self._caches):
                return call()

        return changed


@dataclass(frozen=True)
class Question:
    """What is not known, what is expected, and how to find out."""

    name: str
    prediction: str
    cells: Sequence[str]
    passes: Sequence[str]
    variants: Mapping[str, Change]
    peers: Sequence[str] = ()


def questions(path: Path = QUESTIONS) -> list[Question]:
    """The open questions, as the file has them."""
    found = []
    for entry in json.loads(path.read_text()):
        variants = {
            name: Change(change.get("rows", {}), [tuple(edit) for edit in change.get("edits", [])])
            for name, change in entry.pop("variants").items()
        }
        found.append(Question(**entry, variants=variants))
    return found


def rows_of(environment: Mapping[str, str], run: str, result: CellResult) -> list[dict[str, object]]:
    cell = result.cell
    common = {name: environment[name] for name in ("date", "gpu", "driver", "nvrtc")} | {"run": run}
    common |= {"head_dim": cell.head_dim, "seqlen": cell.seqlen_k, "mask": cell.mask, "dropout_p": cell.dropout_p}
    return [
        {**common, "pass": m.pass_, "variant": f"{cell.name}: {m.provider}", "ms_median": f"{m.sample.median:.6g}"}
        for m in result.measurements
        if m.sample
    ]


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--questions", default="*", help="a shell pattern on the names of open questions")
    parser.add_argument("--file", type=Path, default=QUESTIONS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=0.1, help="least seconds of rest before a burst")
    parser.add_argument("--gate-heads", type=int, default=2, help="key/value heads that the gate checks in each cell")
    parser.add_argument("--list", action="store_true", help="only show the questions")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    console = console or Console()
    asked = [question for question in questions(args.file) if fnmatch.fnmatchcase(question.name, args.questions)]
    wrong, run, environment = 0, record.new_run(), record.environment()
    for question in asked:
        console.print(f"[bold]{question.name}[/]: {question.prediction}")
        if args.list:
            continue
        providers = [Cuflash("as planned"), *(Variant(*item) for item in question.variants.items())]
        providers += [PROVIDERS[name] for name in question.peers]
        for provider in providers:
            provider.load()
        for cell in track(select(question.cells), question.name, console=console):
            bench = CellBench(cell, providers, question.passes, args.gate_heads)
            result = bench.run(args.rounds, args.idle, float("inf"), lambda job: None)
            record.append_rows(args.out / "variants.csv", COLUMNS, rows_of(environment, run, result))
            console.print(describe(result))
            for name, pass_, why in result.failures:
                console.print(f"  [red]{name} {pass_}:[/] {why}")
            wrong += len(result.failures) + sum(m.sample is None for m in result.measurements)
            release_memory()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
