"""Ratios between measured rows, and what is compiled before they are taken."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from benchmarks import ahead, compare, record, summary
from benchmarks.workloads import GROUPS, Cell, square
from cuflash.device import DeviceInfo

ENVIRONMENT = {"date": "2026-01-01T00:00:00Z", "source_hash": "abc", "gpu": "some GPU", "driver": "1", "nvrtc": "13.0"}


def speed_row(cell: Cell, run: str, provider: str, ms: float, pass_: str = "fwd", **changes) -> dict[str, str]:
    """A row of the speed table as it is read back."""
    row = {**ENVIRONMENT, **cell.problem_columns(), "run": run, "provider": provider, "pass": pass_, "ms_median": ms,
           "tflops": cell.flops(pass_) / ms * 1e-9, "ok": True}  # fmt: skip
    return {name: str(value) for name, value in (row | changes).items()}


class TestCompare:
    cell = square(128, 8192, "causal")

    def hopper(self, rows):
        return compare.compare(compare.HOPPER, compare.by_run(rows))

    def test_the_newest_run_with_these_peers_counts(self):
        rows = [
            speed_row(self.cell, "old", "cuflash", 2), speed_row(self.cell, "old", "fa3", 1),
            speed_row(self.cell, "new", "cuflash", 2), speed_row(self.cell, "new", "fa3", 3),
            speed_row(self.cell, "features", "cuflash", 9), speed_row(self.cell, "features", "torch_cudnn", 1),
            speed_row(self.cell, "alone", "fa3", 1),
        ]  # fmt: skip
        (found,) = self.hopper(rows)
        assert (found.run, found.ratio) == ("new", 1.5)

    def test_builds_of_one_library_are_one_peer(self):
        times = {"cuflash": 2, "fa3": 4, "fa3_jax": 3, "fa4": 5, "torch_flash": 1}
        (found,) = self.hopper(speed_row(self.cell, "r", name, ms) for name, ms in times.items())
        assert found.peers == {"FlashAttention-3": 3, "FlashAttention-4": 5}
        assert (found.best, found.ratio, found.ratio_to("FlashAttention-4")) == ("FlashAttention-3", 1.5, 2.5)

    def test_what_failed_or_ran_without_a_gpu_is_left_out(self):
        rows = [speed_row(self.cell, "r", "cuflash", 2), speed_row(self.cell, "r", "fa3", 1, ok=False),
                speed_row(self.cell, "r", "fa4", 1, gpu="none; some processor")]  # fmt: skip
        assert self.hopper(rows) == []

    def test_a_step_is_held_against_one_library_at_a_time(self):
        times = {("cuflash", "fwd"): 2, ("cuflash", "bwd"): 6, ("fa3", "fwd"): 1, ("fa3_jax", "bwd"): 9,
                 ("fa4", "fwd"): 3, ("fa4", "bwd"): 6, ("torch_cudnn", "fwd"): 1}  # fmt: skip
        found = self.hopper(speed_row(self.cell, "r", name, ms, pass_) for (name, pass_), ms in times.items())
        assert [one.pass_ for one in found] == ["fwd", "bwd", "fwd+bwd"]
        assert found[2].peers == {"FlashAttention-3": 10, "FlashAttention-4": 9}
        assert found[2].ratio == 9 / 8

    def test_means_of_a_kind_and_of_all(self):
        cells = square(64, 512), square(64, 1024), square(128, 512)
        rows = [speed_row(cell, "r", "cuflash", 1) for cell in cells]
        rows += [speed_row(cell, "r", "fa4", ms) for cell, ms in zip(cells, (4, 1, 2), strict=True)]
        header, lines = compare.summary_lines(compare.HOPPER, self.hopper(rows))
        assert header == ["pass", "cells", "number", "FlashAttention-4", "best peer", "worst", "in cell"]
        assert lines == [
            ["forward", "D 64, full", "2", "2.000", "2.000", "1.000", "d64-full-1k"],
            ["forward", "D 128, full", "1", "2.000", "2.000", "2.000", "d128-full-512"],
            ["forward", "all", "3", "2.000", "2.000", "1.000", "d64-full-1k"],
        ]

    def test_features_are_held_against_the_plain_cell_of_their_run(self):
        plain = square(64, 8192, "causal")
        window, sinks = dataclasses.replace(plain, mask="window1024"), dataclasses.replace(plain, feature="sinks")
        share = window.visible_pairs() / plain.visible_pairs()
        rows = [
            speed_row(plain, "r", "cuflash", 1), speed_row(window, "r", "cuflash", 2 * share),
            speed_row(plain, "r", "cuflash", 1, "bwd"), speed_row(sinks, "r", "cuflash", 4, "bwd"),
            speed_row(sinks, "without plain", "cuflash", 9, "bwd"),
        ]  # fmt: skip
        lines = compare.feature_lines(compare.feature_ratios(compare.by_run(rows)))
        assert lines == (["to plain", "D 64, S 8k"], [["window1024", "0.50 / –"], ["sinks", "– / 0.25"]])

    def test_summary_prints_what_the_records_have(self, tmp_path, capsys):
        assert summary.main(["--results", str(tmp_path)]) == 1
        rows = [speed_row(self.cell, run, name, 1) for run in ("a", "b") for name in ("cuflash", "fa4")]
        record.append_rows(tmp_path / "speed.csv", record.SPEED_COLUMNS, rows)
        console = Console(width=160)
        assert summary.main(["--results", str(tmp_path), "--cells", "--run", "a"], console) == 0
        printed = capsys.readouterr().out
        assert "in run a" in printed and "d128-causal-8k" in printed


class TestAhead:
    @pytest.mark.parametrize("group", ["hopper", "features", "unequal"])
    def test_kernels_of_every_cell_are_known_before(self, group):
        device = DeviceInfo.named("sm_90a")
        for kernels, entry in ((None, "forward_sm90"), ("sm80", "forward_sm80")):
            specs = ahead.specs(GROUPS[group], ["fwd"], kernels, device)
            assert {spec.entry for spec in specs} == {entry}
        assert len(ahead.specs(GROUPS[group], ["fwd", "bwd"], None, device)) > len(specs)
