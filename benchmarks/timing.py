"""One way of timing for every library: bursts after an idle gap, interleaved round by round.

Short bursts after a gap keep the board's power state the same for everyone, and interleaving spreads what drifts
(temperature, clocks) evenly, so that the *ratio* of two medians of one run means something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.kernels import hold_stream

WARM_LAUNCHES = 2
BURST_LAUNCHES = 6
FEWEST_LAUNCHES = 3
LONG_BURST = 60e-3  # seconds; long calls have enough work in fewer launches
# Seconds of rest for a second of the burst before. Calls of 10 ms and more meet the board's power limit, which takes
# clocks down and lets them go up again over a second: with rests of 0.1 s a kernel was up to 8 % faster in every other
# place of a round.
REST = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the rounds of one job gave, in milliseconds a call: ``median`` is the median of burst medians."""

    median: float
    p20: float
    p80: float
    bursts: int


class Clock(Protocol):
    """How long one call takes, seen from where a library runs."""

    def burst(self, call: Callable[[], object]) -> list[float]:
        """Milliseconds of each timed call of one burst."""


def burst_launches(seconds: float, launches: int = BURST_LAUNCHES) -> int:
    """Launches of a burst for a call that takes ``seconds``.

    >>> burst_launches(1e-4), burst_launches(15e-3), burst_launches(1.0)
    (6, 4, 3)
    """
    return min(launches, max(FEWEST_LAUNCHES, int(LONG_BURST / seconds)))


class EventClock:
    """CUDA events on the stream that CuPy and PyTorch share, one pair a launch.

    A kernel that only waits holds the stream while the host enqueues the burst: no library is charged for its host
    time, which has a table of its own.
    """

    LONGEST_WAIT = 0.050  # seconds; a host slower than that is charged the rest

    def __init__(self, launches: int = BURST_LAUNCHES):
        import cupy

        self._cupy, self._launches = cupy, launches
        self._probes: dict[Callable[[], object], tuple[float, int]] = {}

    def burst(self, call: Callable[[], object]) -> list[float]:
        cupy = self._cupy
        if call not in self._probes:
            enqueue, whole = self._probe(call)
            self._probes[call] = enqueue, burst_launches(whole, self._launches)
        enqueue, launches = self._probes[call]
        hold = min(1.5 * (WARM_LAUNCHES + launches) * enqueue + 100e-6, self.LONGEST_WAIT)
        events = [cupy.cuda.Event() for _ in range(launches + 1)]
        hold_stream(hold)
        for _ in range(WARM_LAUNCHES):
            call()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [cupy.cuda.get_elapsed_time(a, b) for a, b in zip(events, events[1:], strict=False)]

    def _probe(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds until one call is enqueued, and until it is done."""
        self._cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        call()
        enqueue = time.perf_counter() - start
        self._cupy.cuda.Device().synchronize()
        return enqueue, time.perf_counter() - start


class DifferenceClock:
    """Host clock for a library whose stream cannot be reached (JAX): the slope between two bursts.

    The cost of the first dispatch and of the final wait is in both bursts and cancels; the longer one lasts at least
    ``shortest_burst`` seconds more than the shorter, so that the host runs ahead of the device. Calls as long as that
    make such costs small by themselves, and clocks that the power limit moves between two bursts would not cancel:
    theirs is one burst, as warm as those of the other libraries.
    """

    def __init__(self, wait: Callable[[object], object], launches: int = BURST_LAUNCHES, shortest_burst: float = 5e-3):
        self._wait, self._launches, self._shortest = wait, launches, shortest_burst
        self._counts: dict[Callable[[], object], tuple[int, bool]] = {}

    def burst(self, call: Callable[[], object]) -> list[float]:
        short = WARM_LAUNCHES
        if call not in self._counts:
            # The rate, not the latency of one call: a few in a row.
            seconds = self._seconds(call, FEWEST_LAUNCHES) / FEWEST_LAUNCHES
            enough = int(self._shortest / seconds) + 1
            self._counts[call] = max(burst_launches(seconds, self._launches), enough), seconds >= self._shortest
        more, is_long = self._counts[call]
        self._seconds(call, short)  # after the idle gap host and clocks are slow to begin: no burst pays
        if is_long:
            return [1e3 * self._seconds(call, more) / more]
        first = self._seconds(call, short)
        return [1e3 * max(self._seconds(call, short + more) - first, 0.0) / more]

    def _seconds(self, call: Callable[[], object], launches: int) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            result = call()
        self._wait(result)
        return time.perf_counter() - start


class HostClock:
    """Calls that have finished when they return (NumPy)."""

    def __init__(self, launches: int = 1):
        self._launches = launches

    def burst(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self._launches):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to time: ``key`` names it in the result."""

    key: Hashable
    call: Callable[[], object]
    clock: Clock


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(bursts: Sequence[Sequence[float]]) -> Sample:
    """Median of burst medians; p20 and p80 over every call of every burst."""
    every = [value for burst in bursts for value in burst]
    median = statistics.median(statistics.median(burst) for burst in bursts)
    return Sample(median, percentile(every, 20), percentile(every, 80), len(bursts))


def interleave(
    jobs: Iterable[Job],
    rounds: int,
    *,
    idle: float = 0.1,
    deadline: float = float("inf"),
    on_burst: Callable[[Job], None] = lambda job: None,
    on_failure: Callable[[Job, Exception], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> dict[Hashable, Sample]:
    """Time every job in every round, the order reversed every other round, a rest before each burst.

    The rest is ``idle`` seconds, and more where the burst before was long: nobody pays for another's heat. No round is
    begun past ``deadline``. A job that raises is left out of further rounds and of the result; the others go on
    (``on_failure`` hears of it; without one the exception is raised).
    """
    alive = list(jobs)
    bursts: dict[Hashable, list[list[float]]] = {job.key: [] for job in alive}
    rest = idle
    for number in range(rounds):
        if number and now() >= deadline:
            break
        for job in alive[:: -1 if number % 2 else 1]:
            sleep(rest)
            start = now()
            try:
                bursts[job.key].append(job.clock.burst(job.call))
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(job, error)
                alive = [other for other in alive if other is not job]
                del bursts[job.key]
                continue
            rest = max(idle, REST * (now() - start))
            on_burst(job)
    return {key: summarize(found) for key, found in bursts.items() if found}
