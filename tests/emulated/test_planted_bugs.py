"""The emulated level can fail: each bug of PLANTED.md, put into the kernels' text, is caught.

A bug is a substitution that must match exactly once, so that it cannot outlive the line that it changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cases import Case
from cuflash.plan import KernelSpec
from cuflash.testing import check
from emulated import test_backward, test_forward
from emulated.emulation import Emulation, Schedule, backward, forward, problem_of
from emulated.twin import TwinError

SEEDS = range(5)
RACE = "race: this thread"
COPYING = "is being copied to"
BOUNDS = "lies in no array"

PLAIN = Case("plain", seqlen_q=65, seqlen_k=113, causal=True)
GROUPED = Case("grouped", batch=2, seqlen_q=65, seqlen_k=113, num_heads=4, num_kv_heads=2)
MODIFIED = {"softcap": 1.5, "alibi": "head", "sinks": True, "dropout_p": 0.3, "dlse": True}
FEATURES = Case("features", seqlen_q=65, seqlen_k=113, window_size=(60, 5), **MODIFIED)
USED = replace(PLAIN, id="used", batch=2, seqused_q=(65, 40), seqused_k=(113, 70))
EMPTY_ROWS = Case("empty-rows", seqlen_q=113, seqlen_k=65, causal=True)
DETERMINISTIC = replace(test_backward.SCHEDULED, deterministic=True)


class WrongAnswer(Exception):
    """An element is off by more than its bound."""


class NotRepeatable(Exception):
    """Two schedules give different bits."""


@dataclass(frozen=True)
class Bug:
    """``before`` becomes ``after`` in the text of kernel ``entry``; running ``case`` must then raise ``error``."""

    name: str
    entry: str
    before: str
    after: str
    error: type[Exception]
    message: str = ""
    case: Case = PLAIN
    tile: str = ""

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
        tiles = test_forward.SMALL_TILES if self.is_forward else test_backward.SMALL_TILES
        plain = Emulation(tile=tiles[self.tile or next(iter(tiles))], schedule=schedule)
        return replace(plain, edit=self.edit) if planted else plain


def run_forward(bug: Bug, *, planted: bool) -> None:
    arrays = bug.case.arrays()
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


FORWARD_BUGS = [
    Bug("missing copy wait", "forward_sm80", "arch::copy_async_wait<0>();", "", TwinError, COPYING),
    Bug("missing barrier before a stage is read", "forward_sm80",
        "arch::block_barrier();  // this block has arrived", "//", TwinError, RACE),
    Bug("missing barrier before the output is staged", "forward_sm80",
        "arch::block_barrier();  // q has been read", "//", TwinError, RACE),
    Bug("stale stage", "forward_sm80", "stage ^= 1;", "", TwinError, RACE),
    Bug("one stage, loaded before it is free", "forward_sm80",
        "arch::block_barrier();\n      if (n_block > blocks.begin)", "if (n_block > blocks.begin)", TwinError, RACE,
        tile="32 rows a warp, one stage"),
    Bug("tiles are loaded without the swizzle", "forward_sm80",
        "tile + swizzled_offset<kRows>(row, column), source",
        "tile + swizzled_offset<kRows>(0, column) + row * kChunkRowBytes, source", WrongAnswer),
    Bug("swizzled columns are added", "forward_sm80",
        "lane_address ^ (column / 16 % 4 * 32)", "lane_address + (column / 16 % 4 * 32)", TwinError, COPYING),
    Bug("rows past the end are loaded", "forward_sm80",
        "first_row + row < end_row && column < columns", "column < columns", TwinError, BOUNDS),
    Bug("columns past head_dim are loaded", "forward_sm80",
        "first_row + row < end_row && column < columns", "first_row + row < end_row", TwinError, BOUNDS,
        case=replace(PLAIN, id="head-dim-40", head_dim=40)),
    Bug("causal mask off by one", "forward_sm80",
        "distance <= right - diagonal", "distance < right - diagonal", WrongAnswer),
    Bug("window off by one", "forward_sm80",
        "distance >= -left - diagonal", "distance > -left - diagonal", WrongAnswer, case=FEATURES),
    Bug("one key too many", "forward_sm80",
        "Orientation::key(i) < seqlen_k - lane_key", "Orientation::key(i) <= seqlen_k - lane_key", WrongAnswer,
        case=GROUPED),
    Bug("tail keys dropped", "forward_sm80",
        "return {begin / kKeys, ceil_divide(end, kKeys)};", "return {begin / kKeys, end / kKeys};", WrongAnswer),
    Bug("mask skipped on cut tiles", "forward_sm80",
        "cut |= key + kKeys - 1 > query + offset + right", "cut |= key > query + offset + right", WrongAnswer),
    Bug("diagonal ignores used lengths", "forward_sm80",
        "shape.top_left ? 0 : seqlen_k - seqlen_q", "shape.top_left ? 0 : shape.seqlen_k - shape.seqlen_q",
        WrongAnswer, case=USED),
    Bug("wrong kv head of a group", "forward_sm80",
        "head / shape.group_size", "head % shape.num_kv_heads", WrongAnswer, case=GROUPED),
    Bug("8-bit dropout threshold", "forward_sm80",
        "return word >= threshold;", "return word >> 24 >= threshold >> 24;", WrongAnswer, case=FEATURES),
    Bug("dropout ignores the head", "forward_sm80",
        "static_cast<uint32>(head) | static_cast<uint32>(batch) << 16", "static_cast<uint32>(batch) << 16",
        WrongAnswer, case=FEATURES),
    Bug("missing rescale", "forward_sm80", "tile::scale_rows(out[s], rescale);", "", WrongAnswer),
    Bug("lse in base 2", "forward_sm80",
        "(maximum * unit + arch::log2(sum)) * kLn2", "(maximum * unit + arch::log2(sum))", WrongAnswer),
    Bug("sink forgotten in the denominator", "forward_sm80",
        "state.sum[r] * rescale + arch::exp2(sink_log2 - reference)", "state.sum[r] * rescale", WrongAnswer,
        case=FEATURES),
    Bug("empty rows are NaN", "forward_sm80",
        "return maximum == -arch::infinity() ? 0.f : maximum * unit;", "return maximum * unit;", WrongAnswer,
        case=EMPTY_ROWS),
    Bug("absent rows keep a finite lse", "forward_sm80",
        "keep[r] ? log_sum_exp", "true ? log_sum_exp", WrongAnswer, case=USED),
]  # fmt: skip

BACKWARD_BUGS = [
    Bug("missing barrier before dS is read", "backward_sm80",
        "arch::block_barrier();  // the dS of all warps", "//", TwinError, RACE),
    Bug("missing barrier before dk is staged", "backward_sm80",
        "arch::block_barrier();  // k and v have been read", "//", TwinError, RACE),
    Bug("statistics of the other stage", "backward_sm80",
        "row_lse = statistics + stage * kStatisticBytes + 4 * warp_query",
        "row_lse = statistics + (stage ^ 1) * kStatisticBytes + 4 * warp_query", TwinError, RACE),
    Bug("turn skipped", "backward_sm80",
        "if (arch::thread_index() == 0) arch::wait_for_turn(turn, n_block);", "", NotRepeatable, case=DETERMINISTIC),
    Bug("turn passed before all warps have added", "backward_sm80",
        "arch::memory_fence();\n      arch::block_barrier();", "", NotRepeatable, case=DETERMINISTIC),
    Bug("turn starts too late", "backward_prepare",
        "if constexpr (!Config::window_left) return 0;", "if constexpr (!Config::window_left) return 1;",
        TwinError, "deadlock", case=DETERMINISTIC),
    Bug("only the first head of a group", "backward_sm80",
        "Cursor{head + 1, blocks.end - 1}", "Cursor{head + 2, blocks.end - 1}", WrongAnswer, case=GROUPED),
    Bug("dq accumulator not cleared", "backward_prepare",
        "Share::clear(params, batch, head, m_block);", "", WrongAnswer),
    Bug("dlse ignored", "backward_prepare", "delta -= params.dlse[source];", ";", WrongAnswer, case=FEATURES),
    Bug("empty rows have probabilities", "backward_prepare",
        "lse == -arch::infinity() ? arch::infinity() : lse * kLog2E", "lse * kLog2E", WrongAnswer, case=EMPTY_ROWS),
    Bug("dk not scaled", "backward_sm80",
        "scale_k[2] = {params.score.scale, params.score.scale}", "scale_k[2] = {1.f, 1.f}", WrongAnswer),
    Bug("dq not scaled", "backward_finish",
        "factor[2] = {params.score.scale, params.score.scale}", "factor[2] = {1.f, 1.f}", WrongAnswer),
    Bug("derivative of the softcap forgotten", "backward_sm80",
        "if constexpr (Config::softcap) tile::multiply(gradients[s], derivative[s]);", "", WrongAnswer, case=FEATURES),
    Bug("dropout forgotten in dP", "backward_sm80",
        "gradients[s][i] = keep ? gradients[s][i] * params.dropout.scale : 0.f;", "", WrongAnswer, case=FEATURES),
    Bug("dropout of the neighbouring lane", "backward_sm80",
        "parity ? random.word[h] : random.word[2 + h], 4)", "parity ? random.word[h] : random.word[2 + h], 8)",
        WrongAnswer, case=FEATURES),
    Bug("warps that share keys skip the barrier", "backward_sm80",
        "arch::block_barrier();\n      if (next.head < end_head)", "if (next.head < end_head)", TwinError, RACE,
        tile="warps share keys"),
    Bug("dsinks sums one warp only", "backward_sinks", "warp < kWarps;", "warp < 1;", WrongAnswer, case=FEATURES),
]  # fmt: skip

BUGS = FORWARD_BUGS + BACKWARD_BUGS
CONTROLS = {(bug.case, bug.tile, bug.is_forward): bug for bug in BUGS}


def sources_of(bug: Bug | None = None, control: Bug | None = None) -> list[tuple[str, tuple[str, ...]]]:
    if bug is None and control is None:
        return []
    run = bug or control
    problem = problem_of(run.case.problem(), run.case.arrays())
    emulation = run.emulation(planted=control is None)
    plan = emulation.plan_forward(problem) if run.is_forward else emulation.plan_backward(problem)
    return emulation.sources(plan)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_caught(bug: Bug) -> None:
    with pytest.raises(bug.error, match=bug.message or None):
        run(bug, planted=True)


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda bug: f"{bug.case.id}-{bug.entry}-{bug.tile}")
def test_the_same_runs_pass_without_the_bug(control: Bug) -> None:
    run(control, planted=False)


def test_all_bugs_are_documented() -> None:
    documented = re.findall(r"^\| ([^|]+?) \|", (Path(__file__).parent / "PLANTED.md").read_text(), re.MULTILINE)
    assert [name for name in documented if name not in ("bug", "---")] == [bug.name for bug in BUGS]
