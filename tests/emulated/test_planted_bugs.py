"""The emulated level can fail: each bug of PLANTED.md, put into the kernels' text, is caught."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from emulated import planted_hopper, planted_portable
from emulated.emulation import problem_of
from emulated.planted import Bug, run

BUGS = [
    *planted_portable.FORWARD_BUGS,
    *planted_portable.BACKWARD_BUGS,
    *planted_hopper.FORWARD_BUGS,
    *planted_hopper.BACKWARD_BUGS,
    *planted_hopper.QUERIES_BUGS,
    *planted_hopper.KEYS_BUGS,
]
CONTROLS = {(bug.case, bug.tile, bug.arch, bug.is_forward): bug for bug in BUGS}


def sources_of(bug: Bug | None = None, control: Bug | None = None) -> list[tuple[str, tuple[str, ...]]]:
    if bug is None and control is None:
        return []
    chosen = bug or control
    problem = problem_of(chosen.case.problem(), chosen.case.arrays())
    emulation = chosen.emulation(planted=control is None)
    plan = emulation.plan_forward(problem) if chosen.is_forward else emulation.plan_backward(problem)
    return emulation.sources(plan)


def cases(bugs: Iterable[Bug], name: Callable[[Bug], str]) -> list:
    """Hopper's, a kernel each to compile and larger tiles to run, are slow together."""
    return [pytest.param(bug, id=name(bug), marks=[pytest.mark.slow] * (bug.arch == "sm_90a")) for bug in bugs]


@pytest.mark.parametrize("bug", cases(BUGS, lambda bug: f"{bug.entry}-{bug.name}"))
def test_is_caught(bug: Bug) -> None:
    with pytest.raises(bug.error, match=bug.message or None):
        run(bug, planted=True)


def control_name(bug: Bug) -> str:
    return f"{bug.case.id}-{bug.entry}-{bug.tile}"


@pytest.mark.parametrize("control", cases(CONTROLS.values(), control_name))
def test_the_same_runs_pass_without_the_bug(control: Bug) -> None:
    run(control, planted=False)


def test_all_bugs_are_documented() -> None:
    documented = re.findall(r"^\| ([^|]+?) \|", (Path(__file__).parent / "PLANTED.md").read_text(), re.MULTILINE)
    assert [name for name in documented if name not in ("bug", "---")] == [bug.name for bug in BUGS]
