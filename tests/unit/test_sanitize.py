"""What is made of compute-sanitizer's reports, which only a GPU can bring about."""

from __future__ import annotations

import pytest
from gpu import sanitize

from cuflash.cuda import nvrtc

WRITTEN, READ = "arch::store_shared(unsigned int, float)+0x10 in sm90.cuh:9", "arch::load_shared_float4+0x8"
OTHER, COPIED = "arch::load_shared_float2+0x8 in common.cuh:5", "arch::copy_bytes_to_shared+0x20 in sm90.cuh:7"
REPORT = """\
========= Error: Race reported between Write access at {}
=========     and Read access at {}
=========
"""


def test_summaries():
    assert sanitize.errors_in("x\n========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitize.errors_in("========= ERROR SUMMARY: 12 errors") == 12
    assert sanitize.errors_in("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)") == 3
    assert sanitize.errors_in("killed") is None


def test_races_that_are_known_to_be_none():
    """Bulk copies by name; hand-overs only where racecheck reports the right one, and only between its functions."""
    text = "".join(REPORT.format(*pair) for pair in ((WRITTEN, READ), (WRITTEN, OTHER), (COPIED, OTHER)))
    races = sanitize.races_in(text)
    assert [sorted(names) for names in races] == [
        ["arch::load_shared_float4", "arch::store_shared"],
        ["arch::load_shared_float2", "arch::store_shared"],
        ["arch::copy_bytes_to_shared", "arch::load_shared_float2"],
    ]
    assert sanitize.known_in(text, frozenset()) == {sanitize.KNOWN_COPIES: 1}
    both = {sanitize.KNOWN_COPIES: 1, sanitize.KNOWN_HANDOVERS: 1}
    assert sanitize.known_in(text, frozenset(races[:1])) == both


RIGHT = f"{REPORT.format(WRITTEN, READ)}========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"
CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed"


@pytest.mark.parametrize(
    ("race", "outcome"), [(RIGHT, "passed"), (CLEAN, "skipped"), ("killed", "failed")], ids=["seen", "missed", "killed"]
)
def test_hand_overs_are_judged_only_by_who_sees_their_race(race, outcome, monkeypatch):
    answers = {"right": RIGHT, "race": race}
    monkeypatch.setattr(sanitize, "watched", lambda tool, arguments, timeout: (0, answers[arguments[-1]]))
    known, entry = sanitize.ask_about_handovers(1.0)
    assert known == {frozenset({"arch::store_shared", "arch::load_shared_float4"})}
    assert entry["outcome"] == outcome
    assert ("reason" in entry) == (outcome != "passed")


@pytest.mark.parametrize(
    ("run", "outcome"),
    [("racecheck", "passed"), ("racecheck of portable kernels", "failed")],
    ids=["Hopper", "portable"],
)
def test_portable_kernels_have_no_known_reports(run, outcome, monkeypatch):
    monkeypatch.setattr(sanitize, "watched", lambda tool, arguments, timeout: (sanitize.FOUND, RIGHT))
    handovers = frozenset(sanitize.races_in(RIGHT))
    assert sanitize.run_tool(*sanitize.RUNS[run], 1.0, handovers)["outcome"] == outcome


def test_the_hand_over_compiles():
    report = nvrtc.compile_text(sanitize.handover_text(), "sm_90a")
    assert (report.spill_stores, report.warnings) == (0, ())
