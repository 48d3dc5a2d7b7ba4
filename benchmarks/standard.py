"""Where standard attention's time goes, step by step, beside ours.

    PYTHONPATH=. python -m benchmarks.standard

Standard attention as a framework runs it: one kernel a step (scores, mask, softmax, dropout, output), the whole
seqlen x seqlen matrix through device memory at each. float16, which CuPy's matrix product takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.kernels import kernel
from benchmarks.reference import Gate
from benchmarks.timing import EventClock, Job, interleave
from benchmarks.workloads import Cell

COLUMNS = (
    *record.ENVIRONMENT_COLUMNS, "provider", "pass", *record.PROBLEM_COLUMNS,
    "run", "step", "ms_median", "max_error_ratio",
)  # fmt: skip
THREADS = 256
SEED = 5


class StandardAttention:
    """The textbook formula on CuPy arrays, (batch, heads, seqlen, head_dim) so that one product serves all heads."""

    def __init__(self, cell: Cell, arrays: dict):
        import cupy

        self._cupy, self._cell = cupy, cell
        self.q, self.k, self.v, self.dout = (
            cupy.ascontiguousarray(arrays[name].swapaxes(1, 2)) for name in ("q", "k", "v", "dout")
        )

    def forward_steps(self) -> list[tuple[str, Callable[[], None]]]:
        """The steps of the forward pass by name; each reads what the one before it wrote."""
        steps = [("matmul q k", self._scores)]
        if self._cell.causal:
            steps.append(("mask", self._mask))
        steps.append(("softmax", self._softmax))
        if self._cell.dropout_p:
            steps.append(("dropout", self._dropout))
        return [*steps, ("matmul p v", self._output)]

    def backward_steps(self) -> list[tuple[str, Callable[[], None]]]:
        """The steps of the backward pass, from the probabilities that the forward kept."""
        steps = [("matmul dv", self._dv), ("matmul dp", self._dprobs)]
        if self._cell.dropout_p:
            steps.append(("dropout", self._dropout_backward))
        return [*steps, ("softmax", self._softmax_backward), ("matmul dq", self._dq), ("matmul dk", self._dk)]

    def forward(self):
        """out, canonical."""
        for _, step in self.forward_steps():
            step()
        return self.out.swapaxes(1, 2)

    def backward(self) -> dict:
        """dq, dk, dv, canonical."""
        for _, step in self.backward_steps():
            step()
        return {name: getattr(self, name).swapaxes(1, 2) for name in ("dq", "dk", "dv")}

    def _scores(self):
        self.scores = self._cupy.matmul(self.q, self.k.swapaxes(2, 3))

    def _mask(self):
        self._elementwise("mask_causal", self.scores, self._cell.seqlen_k)

    def _softmax(self):
        self.probs = self._cupy.empty_like(self.scores)
        self._rows("softmax_rows", self.scores, self.probs)
        self.kept = self.probs
        del self.scores

    def _dropout(self):
        self.kept = self._cupy.empty_like(self.probs)
        self._drop(self.probs, self.kept)

    def _output(self):
        self.out = self._cupy.matmul(self.kept, self.v)

    def _dv(self):
        self.dv = self._cupy.matmul(self.kept.swapaxes(2, 3), self.dout)

    def _dprobs(self):
        self.dprobs = self._cupy.matmul(self.dout, self.v.swapaxes(2, 3))

    def _dropout_backward(self):
        self._drop(self.dprobs, self.dprobs)

    def _softmax_backward(self):
        self.dscores = self._cupy.empty_like(self.probs)
        self._rows("softmax_rows_backward", self.probs, self.dprobs, self.dscores)
        del self.dprobs

    def _dq(self):
        self.dq = self._cupy.matmul(self.dscores, self.k)

    def _dk(self):
        self.dk = self._cupy.matmul(self.dscores.swapaxes(2, 3), self.q)

    def _rows(self, name: str, *matrices):
        rows = matrices[0].size // self._cell.seqlen_k
        scale = self._cupy.float32(self._cell.softmax_scale)
        kernel(name)((rows,), (THREADS,), (*matrices, self._cupy.int32(self._cell.seqlen_k), scale))

    def _drop(self, values, out):
        self._elementwise(
            "dropout", values, out, self._cupy.uint32(SEED), self._cupy.float32(self._cell.dropout_p), size=values.size
        )

    def _elementwise(self, name: str, *arguments, size: int | None = None):
        size = size or arguments[0].size
        numbers = [self._cupy.int32(a) if isinstance(a, int) else a for a in arguments]
        kernel(name)((-(-size // THREADS),), (THREADS,), (*numbers, self._cupy.int64(size)))


def figure_cell(seqlen: int = 2048, dropout: bool = True) -> Cell:
    """GPT-2 medium's heads, the model of the FlashAttention paper's first figure."""
    return Cell(
        16384 // seqlen, seqlen, seqlen, 16, 16, 64, 64, "causal", "dropout0.1" if dropout else "plain", "float16"
    )


def step_calls(attention: StandardAttention) -> dict[tuple[str, str], Callable[[], None]]:
    """One call for each step, repeatable on its own after a whole forward and backward."""
    attention.forward()
    attention.backward()
    attention._scores()
    attention._dprobs()
    calls = {}
    for pass_, steps in (("fwd", attention.forward_steps()), ("bwd", attention.backward_steps())):
        for name, step in steps:
            calls[pass_, name] = _kept(attention, step)
    return calls


def _kept(attention: StandardAttention, step: Callable[[], None]) -> Callable[[], None]:
    """The step, with what it frees put back: a step alone is launched several times."""

    def call():
        before = vars(attention).copy()
        step()
        vars(attention).update({name: value for name, value in before.items() if name in ("scores", "dprobs")})

    return call


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.standard", description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    import cupy

    from benchmarks.providers import PROVIDERS

    cell, plain = figure_cell(args.seqlen), figure_cell(args.seqlen, dropout=False)
    arrays = random_inputs(cell, cupy)
    bound = PROVIDERS["cuflash"].bind(cell, arrays)
    # Standard attention drops by a hash of its own, so the gate sees it without dropout.
    gated = StandardAttention(plain, arrays)
    ratios = {
        "standard": Gate(plain, arrays).error_ratio({"out": gated.forward(), **gated.backward()}),
        "cuflash": Gate(cell, arrays).error_ratio(
            {**bound.outputs(bound.forward()), **bound.gradients(bound.backward())}
        ),
    }
    del gated
    calls = {("standard", *key): call for key, call in step_calls(StandardAttention(cell, arrays)).items()}
    calls |= {("cuflash", "fwd", "whole pass"): bound.forward, ("cuflash", "bwd", "whole pass"): bound.backward}
    clock = EventClock()
    samples = interleave([Job(key, call, clock) for key, call in calls.items()], args.rounds)
    environment, run = record.environment(), record.new_run()
    rows = []
    for (provider, pass_, step), sample in samples.items():
        rows.append({
            **environment, "provider": provider, "pass": pass_, **cell.problem_columns(), "run": run, "step": step,
            "ms_median": f"{sample.median:.6g}", "max_error_ratio": f"{ratios[provider]:.4g}",
        })  # fmt: skip
        Console().print(f"{provider:9} {pass_} {step:12} {sample.median:8.3f} ms")
    record.append_rows(args.out / "standard.csv", COLUMNS, rows)
    total = {
        name: statistics.fsum(s.median for key, s in samples.items() if key[0] == name)
        for name in ("standard", "cuflash")
    }
    Console().print(f"standard {total['standard']:.3f} ms, cuflash {total['cuflash']:.3f} ms, forward and backward")


if __name__ == "__main__":
    main()
