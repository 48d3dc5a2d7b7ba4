"""Clocks and the interleaving of rounds, without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.timing import Job, interleave, percentile, summarize


class FakeClock:
    """Gives prepared bursts and writes down who was timed."""

    def __init__(self, log: list, values=(1.0, 2.0, 9.0)):
        self.log, self.values = log, values

    def burst(self, call):
        self.log.append(call())
        return list(self.values)


class TestTiming:
    def test_summary_is_the_median_of_burst_medians(self):
        sample = summarize([[1.0, 2.0, 30.0], [3.0, 4.0, 5.0], [7.0, 8.0, 9.0]])
        assert sample.median == 4.0
        assert sample.bursts == 3
        assert sample.p20 < sample.median < sample.p80

    def test_percentile_agrees_with_numpy(self):
        values = list(np.random.default_rng(0).standard_normal(17))
        assert percentile(values, 20) == pytest.approx(np.percentile(values, 20))

    def test_order_is_reversed_every_other_round(self):
        log, slept = [], []
        jobs = [Job(name, lambda name=name: name, FakeClock(log)) for name in "abc"]
        interleave(jobs, rounds=3, idle=0.1, sleep=slept.append, now=lambda: 0.0)
        assert "".join(log) == "abccbaabc"
        assert slept == [0.1] * 9

    def test_a_long_burst_is_followed_by_a_long_rest(self):
        now, slept = [0.0], []

        class SlowClock:
            def burst(self, call):
                now[0] += call()
                return [1.0]

        jobs = [Job(seconds, lambda seconds=seconds: seconds, SlowClock()) for seconds in (0.01, 0.3)]
        interleave(jobs, rounds=2, idle=0.1, sleep=slept.append, now=lambda: now[0])
        assert slept == [0.1, 0.1, pytest.approx(0.6), pytest.approx(0.6)]

    def test_no_round_begins_past_the_deadline(self):
        log, now = [], [0.0]

        def call():
            now[0] += 2.5
            return "a"

        samples = interleave(
            [Job("a", call, FakeClock(log))], rounds=9, deadline=6.0, sleep=lambda _: None, now=lambda: now[0]
        )
        assert len(log) == 3
        assert samples["a"].bursts == 3

    def test_a_job_that_fails_leaves_the_others_alone(self):
        log, heard = [], []

        def broken():
            raise RuntimeError("no kernel")

        jobs = [Job("broken", broken, FakeClock(log)), Job("fine", lambda: "fine", FakeClock(log))]
        samples = interleave(
            jobs, rounds=2, sleep=lambda _: None, on_failure=lambda job, error: heard.append((job.key, str(error)))
        )
        assert list(samples) == ["fine"]
        assert heard == [("broken", "no kernel")]

    def test_difference_clock_cancels_what_both_bursts_pay(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

        def call():
            now[0] += 0.002

        def wait(_):
            now[0] += 0.004  # a constant cost that a plain division would charge to the calls

        clock = timing.DifferenceClock(wait, shortest_burst=0.005)
        assert clock.burst(call) == [pytest.approx(2.0)]

    def test_long_calls_are_timed_in_one_burst(self, monkeypatch):
        now, calls = [0.0], []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

        def call():
            calls.append(now[0])
            now[0] += 0.03 if len(calls) % 2 else 0.05  # clocks that go up and down

        clock = timing.DifferenceClock(lambda _: None, shortest_burst=0.005)
        clock.burst(call)
        calls.clear()
        assert clock.burst(call) == [pytest.approx(1e3 * (0.03 + 0.05 + 0.03) / 3)]
        assert len(calls) == timing.WARM_LAUNCHES + timing.FEWEST_LAUNCHES

    def test_difference_clock_does_not_pay_for_the_idle_gap(self, monkeypatch):
        now, gap = [0.0], [0.0]
        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

        def call():
            now[0] += 0.002 + gap[0]
            gap[0] = 0.0

        clock = timing.DifferenceClock(lambda _: None, shortest_burst=0.005)
        clock.burst(call)
        gap[0] = 0.004  # clocks and host are slow to begin
        assert clock.burst(call) == [pytest.approx(2.0)]
