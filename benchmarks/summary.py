"""Print how ours compares with the best peer, from the records.

    PYTHONPATH=. python -m benchmarks.summary [--run RUN ...] [--cells]

Without ``--run``, every comparison is made from the newest run that has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import compare, record


def tables(rows: Iterable[compare.Row], by_cell: bool = False) -> list[Table]:
    """A table for each comparison that the rows have, and one for the features."""
    runs = compare.by_run(rows)
    found = []
    for comparison in compare.COMPARISONS:
        if compared := compare.compare(comparison, runs):
            title = f"{comparison.title}: {comparison.ours} in run {', '.join(dict.fromkeys(c.run for c in compared))}"
            found.append(_table(title, compare.summary_lines(comparison, compared)))
            if by_cell:
                found.append(_table(title, compare.cell_lines(compared)))
    if ratios := compare.feature_ratios(runs):
        title = "features to plain on visible pairs, forward / backward"
        found.append(_table(title, compare.feature_lines(ratios)))
    return found


def _table(title: str, lines: compare.Lines) -> Table:
    header, body = lines
    table = Table(*header, title=title)
    for line in body:
        table.add_row(*line)
    return table


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", default=(), help="only these runs (ids of the column `run`)")
    parser.add_argument("--cells", action="store_true", help="every cell, too")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    rows = [row for row in record.read_rows(args.results / "speed.csv") if not args.run or row["run"] in args.run]
    found = tables(rows, args.cells)
    for table in found:
        (console or Console()).print(table)
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
