"""What a planted bug is, and how the emulated level runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cases import Case, poison_unused
from cuflash.plan import KernelSpec
from cuflash.testing import check
from emulated import test_backward, test_forward
from emulated.emulation import Emulation, Schedule, backward, forward, problem_of

SEEDS = range(5)
PLAIN = Case("plain", seqlen_q=65, seqlen_k=113, causal=True)


class WrongAnswer(Exception):
    """An element is off by more than its bound."""


class NotRepeatable(Exception):
    """Two schedules give different bits."""


@dataclass(frozen=True)
class Bug:
    """``before`` becomes ``after`` in the text of kernel ``entry``; running ``case`` must then raise ``error``.

    ``before`` must occur exactly once, so that a bug cannot outlive the line that it changes. ``tile`` names one of the
    small tiles of the tests of the portable kernels, ``row`` overrides fields of a row of the Hopper kernels.
    """

    name: str
    entry: str
    before: str
    after: str
    error: type[Exception]
    message: str = ""
    case: Case = PLAIN
    tile: str = ""
    arch: str = "sm_80"
    row: tuple[tuple[str, int], ...] = ()

    @property
    def is_forward(self) -> bool:
        return self.entry.startswith("forward")

    def edit(self, spec: KernelSpec, text: str) -> str:
        if spec.entry != self.entry:
            return text
        count = text.count(self.before)
        assert count == 1, f"{self.before!r} occurs {count} times in {spec.source}"
        return text.replace(self.before, self.after)

    def emulation(self, schedule: Schedule = Schedule(), *, planted: bool) -> Emulation:
        plain = Emulation(self.arch, tile=self.row, schedule=schedule)
        if self.arch == "sm_80":
            tiles = test_forward.SMALL_TILES if self.is_forward else test_backward.SMALL_TILES
            plain = replace(plain, tile=tiles[self.tile or next(iter(tiles))])
        return replace(plain, edit=self.edit) if planted else plain


def run_forward(bug: Bug, *, planted: bool) -> None:
    arrays = bug.case.arrays()
    poison_unused(arrays)
    problem = problem_of(bug.case.problem(), arrays)
    for seed in SEEDS:
        report = check(forward(problem, arrays, bug.emulation(Schedule(seed), planted=planted)), problem, arrays)
        if not report.ok:
            raise WrongAnswer(f"\n{report}")


def run_backward(bug: Bug, *, planted: bool) -> None:
    problem, arrays, out, lse = test_backward.operands(bug.case)
    different_dq = set()
    for seed in SEEDS:
        emulation = bug.emulation(Schedule(seed, resident_blocks=8), planted=planted)
        gradients = backward(problem, arrays, out, lse, emulation)
        different_dq.add(gradients["dq"].tobytes())
    report = check(gradients, problem, arrays)
    if not report.ok:
        raise WrongAnswer(f"\n{report}")
    if bug.case.deterministic and len(different_dq) > 1:
        raise NotRepeatable("dq")


def run(bug: Bug, *, planted: bool) -> None:
    (run_forward if bug.is_forward else run_backward)(bug, planted=planted)
