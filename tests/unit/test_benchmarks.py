"""The benchmarks without a GPU: cells, clocks, the gate, records, and a run that truly runs on NumPy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu import gpu_record
from rich.console import Console

from benchmarks import (
    accuracy,
    energy,
    hbm,
    host,
    memory,
    numpy_dense,
    plot,
    providers,
    record,
    run,
    standard,
    timing,
)
from benchmarks.inputs import random_inputs
from benchmarks.providers.base import Bound, Provider
from benchmarks.reference import Gate, Precision, head_reference, sampled_heads
from benchmarks.timing import HostClock
from benchmarks.workloads import GROUPS, Cell, select, square
from cuflash.problem import Problem, View
from cuflash.testing import Arrays, oracle_backward, oracle_forward

SMALL = Cell(2, 65, 97, 4, 2, 32, 16, "causal", dtype="float32")
ENVIRONMENT = {"date": "2026-01-01T00:00:00Z", "source_hash": "abc", "gpu": "some GPU", "driver": "1", "nvrtc": "13.0"}


class TestWorkloads:
    def test_speed_cells_follow_the_convention(self):
        assert len(GROUPS["hopper"]) == 3 * 2 * 7
        assert set(GROUPS["portable"]) < set(GROUPS["hopper"])
        for cell in GROUPS["hopper"]:
            assert cell.batch * cell.seqlen_q == max(16384, cell.seqlen_q)
            assert cell.num_heads * cell.head_dim == 2048
        assert {(cell.num_heads, cell.num_kv_heads, cell.head_dim) for cell in GROUPS["gqa"]} == {(64, 8, 128)}

    def test_every_feature_has_its_plain_cell(self):
        plain = {cell.plain for cell in GROUPS["features"]}
        assert plain < set(GROUPS["features"])
        assert {cell.mask for cell in plain} == {"causal"}
        assert len(GROUPS["features"]) == 8 * len(plain)

    def test_flops(self):
        full, causal = square(128, 2048), square(128, 2048, "causal")
        assert full.flops("fwd") == 4 * 8 * 16 * 2048**2 * 128
        assert causal.flops("fwd") == full.flops("fwd") / 2
        assert full.flops("bwd") == 2.5 * full.flops("fwd")

    @pytest.mark.parametrize("mask", ["causal", "window5", "window1000"])
    def test_visible_pairs_are_those_of_the_mask(self, mask):
        cell = dataclasses.replace(SMALL, mask=mask)
        i, j = np.ogrid[: cell.seqlen_q, : cell.seqlen_k]
        distance = i + cell.seqlen_k - cell.seqlen_q - j
        visible = (distance >= 0) & (distance <= (cell.window_left if cell.window_left is not None else 10**9))
        assert cell.visible_pairs() == visible.sum()

    def test_names_are_unique(self):
        cells = [cell for group in GROUPS.values() for cell in group]
        assert len({cell.name for cell in cells}) == len(set(cells))

    def test_select_takes_groups_and_patterns_once(self):
        assert select(["hopper", "d64-full-2k"]) == list(GROUPS["hopper"])
        with pytest.raises(ValueError, match="no cell or group is named 'nonsense'"):
            select(["nonsense"])


def dense_arrays(cell: Cell) -> tuple[Problem, Arrays, dict]:
    """The same problem for the gate's reference and for the library's oracle."""
    inputs = random_inputs(cell, np)
    names = [name for name in ("q", "k", "v", "alibi_slopes", "sinks") if name in inputs]
    problem = Problem.build({name: View.of(inputs[name].shape, inputs[name].dtype.name) for name in names},
                            **cell.attention_keywords())  # fmt: skip
    arrays = Arrays(inputs["q"], inputs["k"], inputs["v"], inputs["dout"], None, inputs.get("alibi_slopes"),
                    inputs.get("sinks"))  # fmt: skip
    return problem, arrays, inputs


class TestGate:
    @pytest.mark.parametrize("mask", ["full", "causal", "window9"])
    @pytest.mark.parametrize("feature", ["plain", "dropout0.3", "alibi", "softcap2", "sinks"])
    def test_reference_is_the_oracle(self, mask, feature, monkeypatch):
        monkeypatch.setattr("benchmarks.reference.ROWS", 20)
        cell = dataclasses.replace(SMALL, mask=mask, feature=feature)
        problem, arrays, inputs = dense_arrays(cell)
        out, _ = oracle_forward(problem, arrays.q, arrays.k, arrays.v, **arrays.features)
        gradients = oracle_backward(problem, arrays.dout, arrays.q, arrays.k, arrays.v, **arrays.features)
        for batch, kv_head in np.ndindex(cell.batch, cell.num_kv_heads):
            found = head_reference(cell, inputs, batch, kv_head, Precision.exact(), backward=True)
            heads = slice(2 * kv_head, 2 * kv_head + 2)
            np.testing.assert_allclose(found["out"], out[batch, :, heads], atol=1e-12)
            np.testing.assert_allclose(found["dq"], gradients["dq"][batch, :, heads], atol=1e-12)
            np.testing.assert_allclose(found["dk"], gradients["dk"][batch, :, kv_head], atol=1e-12)
            np.testing.assert_allclose(found["dv"], gradients["dv"][batch, :, kv_head], atol=1e-12)

    def test_passes_what_is_right_and_nothing_else(self):
        cell = dataclasses.replace(SMALL, dtype="bfloat16")
        inputs = random_inputs(cell, np)
        bound = providers.PROVIDERS["cuflash_numpy"].bind(cell, inputs)
        gate = Gate(cell, inputs, heads=99)
        right = {**bound.outputs(bound.forward()), **bound.gradients(bound.backward())}
        assert gate.error_ratio(right) <= 1
        for name, array in right.items():
            shifted = np.roll(array.astype(np.float32), 1, axis=1).astype(array.dtype)
            assert gate.error_ratio({**right, name: shifted}) > 1, name
            unwritten = array.copy()
            unwritten[-1, -1, -1, -1] = np.nan
            assert gate.error_ratio({**right, name: unwritten}) == float("inf"), name

    def test_samples_the_first_and_the_last_head(self):
        heads = sampled_heads(square(64, 2048), 4)
        assert len(heads) == 4
        assert heads[0] == (0, 0)
        assert heads[-1] == (7, 31)

    def test_samples_fewer_of_long_heads(self):
        assert sampled_heads(square(64, 32768), 4) == [(0, 0), (0, 31)]
        assert sampled_heads(square(64, 8192, feature="dropout0.1"), 4) == [(0, 0)]


class FakeProvider(Provider):
    """Attention of the NumPy backend, right or spoiled, on any cell."""

    device = "cpu"

    def __init__(self, name: str, spoil=lambda array: array):
        self.name, self._spoil = name, spoil

    def unsupported(self, cell, pass_):
        return None

    def clock(self):
        return HostClock()

    def bind(self, cell, arrays) -> Bound:
        right = providers.PROVIDERS["cuflash_numpy"].bind(cell, arrays)
        return dataclasses.replace(right, outputs=lambda result: {"out": self._spoil(result[0])})


def broken(_):
    raise RuntimeError("out of memory")


class TestRun:
    arguments = ("--cells", "d32-causal-128-gqa*", "--rounds", "2", "--idle", "0")

    def run(self, monkeypatch, tmp_path: Path, *extra: Provider, arguments: tuple = ()) -> list[dict[str, str]]:
        for provider in extra:
            monkeypatch.setitem(providers.PROVIDERS, provider.name, provider)
        names = ",".join(["cuflash_numpy", *(provider.name for provider in extra)])
        self.code = run.main([*self.arguments, "--providers", names, "--out", str(tmp_path), *arguments])
        return record.read_rows(tmp_path / "speed.csv")

    def test_records_both_passes(self, monkeypatch, tmp_path):
        rows = self.run(monkeypatch, tmp_path)
        assert self.code == 0
        assert tuple(rows[0]) == record.SPEED_COLUMNS
        assert [row["pass"] for row in rows] == ["fwd", "bwd"]
        assert all(row["ok"] == "True" and float(row["ms_median"]) > 0 for row in rows)
        assert len({row["run"] for row in rows}) == 1
        (about,) = record.read_rows(tmp_path / "runs.csv")
        assert about["run"] == rows[0]["run"]

    def test_what_is_wrong_is_recorded_and_not_timed(self, monkeypatch, tmp_path):
        rows = self.run(monkeypatch, tmp_path, FakeProvider("wrong", spoil=lambda out: out * np.float32(1.01)))
        wrong = {row["pass"]: row for row in rows if row["provider"] == "wrong"}
        assert wrong["fwd"]["ok"] == "False"
        assert wrong["fwd"]["ms_median"] == ""
        assert float(wrong["fwd"]["max_error_ratio"]) > 1
        assert wrong["bwd"]["ok"] == "True"

    def test_a_failure_is_recorded_and_isolated(self, monkeypatch, tmp_path):
        rows = self.run(monkeypatch, tmp_path, FakeProvider("broken", spoil=broken))
        assert {row["provider"] for row in rows if row["pass"] == "fwd"} == {"cuflash_numpy"}
        (failure,) = record.read_rows(tmp_path / "failures.csv")
        assert (failure["provider"], failure["pass"]) == ("broken", "fwd")
        assert "out of memory" in failure["reason"]

    def test_used_up_time_ends_the_run_between_cells(self, monkeypatch, tmp_path, capsys):
        rows = self.run(monkeypatch, tmp_path, arguments=("--cells", "smoke", "--budget-seconds", "0.000001"))
        assert rows == []
        assert "not measured" in capsys.readouterr().out

    def test_dry_run_loads_no_library(self):
        program = "import sys; from benchmarks.run import main; main(sys.argv[1:]); " \
                  "assert not {'torch', 'jax', 'cupy'} & sys.modules.keys()"  # fmt: skip
        command = [sys.executable, "-c", program, "--dry-run", "--cells", "hopper,features"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT, check=True)
        assert done.stdout.count("GFLOP") == len(set(GROUPS["hopper"] + GROUPS["features"]))
        assert "fa3 (has no alibi)" in done.stdout

    def test_ratios_are_against_the_best_peer_of_the_cell(self):
        def result(cell, **ms):
            samples = [run.Measurement(name, "fwd", 0.5, timing.Sample(t, t, t, 1)) for name, t in ms.items()]
            return run.CellResult(cell, samples)

        cells = GROUPS["portable"]
        results = [result(cells[0], cuflash=1.0, fa3=2.0, fa4=1.0), result(cells[1], cuflash=2.0, fa3=1.0, fa4=8.0)]
        table = run.summary_table(results, ["fwd"])
        columns = [list(column.cells) for column in table.columns]
        assert columns[2] == ["fa3", "fa4", "best peer"]
        assert columns[5] == ["0.500", "1.000", "0.500"]  # worst cell
        assert columns[4] == ["1.000", "2.000", "0.707"]  # geometric mean

    @pytest.mark.parametrize("arguments", [["--passes", "sideways"], ["--providers", "nobody"]])
    def test_unknown_names_are_refused(self, arguments):
        with pytest.raises(SystemExit):
            run.main(arguments)

    def test_absent_libraries_say_why(self):
        loaded, absent = providers.available(["fa4", "cuflash_numpy"])
        assert [provider.name for provider in loaded][-1] == "cuflash_numpy"
        assert set(absent) <= {"fa4"}
        assert all(absent.values())

    def test_a_build_without_a_backward_is_not_asked_for_one(self, monkeypatch):
        fa3, cell = providers.PROVIDERS["fa3"], square(64, 512)
        assert fa3.unsupported(cell, "bwd") is None
        monkeypatch.setitem(sys.modules, "fa3_fwd_interface", object())
        assert fa3.unsupported(cell, "fwd") is None
        assert fa3.unsupported(cell, "bwd") == "is a build without a backward"


class TestRecord:
    def test_source_hash_follows_names_and_contents(self, tmp_path):
        (tmp_path / "cuflash").mkdir()
        (tmp_path / "kernels_cu").mkdir()
        file = tmp_path / "cuflash" / "a.py"
        file.write_text("x = 1")
        first = record.source_hash(tmp_path)
        (tmp_path / "cuflash" / "__pycache__").mkdir()
        (tmp_path / "cuflash" / "__pycache__" / "a.pyc").write_bytes(b"1")
        assert record.source_hash(tmp_path) == first
        file.write_text("x = 2")
        assert record.source_hash(tmp_path) != first
        file.write_text("x = 1")
        assert record.source_hash(tmp_path) == first
        file.rename(tmp_path / "kernels_cu" / "a.py")
        assert record.source_hash(tmp_path) != first

    def test_tables_are_appended_to(self, tmp_path):
        path = tmp_path / "t.csv"
        record.append_rows(path, ("a", "b"), [{"a": 1}])
        record.append_rows(path, ("a", "b"), [{"a": 2, "b": "x, y"}])
        assert record.read_rows(path) == [{"a": "1", "b": ""}, {"a": "2", "b": "x, y"}]
        with pytest.raises(ValueError, match="move the old table aside"):
            record.append_rows(path, ("a", "c"), [{"a": 1}])
        with pytest.raises(ValueError, match="no columns"):
            record.append_rows(path, ("a", "b"), [{"z": 1}])

    def test_environment_has_the_first_columns(self):
        assert tuple(record.environment()) == record.ENVIRONMENT_COLUMNS

    @pytest.mark.parametrize("module", [accuracy, energy, hbm, memory, numpy_dense, standard])
    def test_every_table_begins_with_them(self, module):
        assert module.COLUMNS[:5] == record.ENVIRONMENT_COLUMNS

    def test_gpu_tests_of_the_same_code_are_merged(self):
        entries = {"t::a": {"outcome": "passed"}, "t::b": {"outcome": "skipped", "reason": "one device"}}
        first = gpu_record.merged({}, ENVIRONMENT, "tests", entries)
        second = gpu_record.merged(first, ENVIRONMENT, "sanitizer", {"memcheck": {"outcome": "passed"}})
        assert second["counts"] == {"passed": 2, "skipped": 1}
        again = gpu_record.merged(second, ENVIRONMENT, "tests", {"t::a": {"outcome": "failed"}})
        assert again["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
        other = gpu_record.merged(
            second, ENVIRONMENT | {"source_hash": "new"}, "tests", {"t::a": {"outcome": "passed"}}
        )
        assert other["counts"] == {"passed": 1}
        json.dumps(other)


class TestOtherMeasurements:
    def test_numpy_beside_dense(self):
        cell = dataclasses.replace(numpy_dense.CELL, seqlen_q=512, seqlen_k=512)
        dense, ours = numpy_dense.measure(cell, rounds=1)
        assert (dense["provider"], ours["provider"]) == ("numpy_dense", "cuflash_numpy")
        assert dense["ok"]
        assert ours["ok"]
        assert dense["peak_bytes"] >= 2 * 4 * 512 * 512 > ours["peak_bytes"]

    def test_profiler_report(self):
        text = "\n".join((
            "==PROF== Connected to process 1", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","a","dram__bytes_read.sum","Mbyte","1,024.5"', '"0","a","dram__bytes_write.sum","Kbyte","2"',
            '"1","b","dram__bytes_read.sum","byte","500"', '"1","b","dram__bytes_write.sum","byte","0"',
        ))  # fmt: skip
        assert hbm.parse_ncu(text) == {"read_bytes": 1024500500.0, "written_bytes": 2000.0, "kernels": 2}
        with pytest.raises(RuntimeError, match="no table"):
            hbm.parse_ncu("==ERROR== no permission")

    def test_ours_computes_the_scores_twice(self):
        assert hbm.gflop("cuflash", hbm.CELL) == pytest.approx(hbm.gflop("standard", hbm.CELL) * 7 / 6)

    def test_idle_energy_is_measured_after_a_rest(self):
        now, slept = [0.0], []

        class Board:
            def joules(self):
                return 75.0 * now[0]

        def sleep(seconds):
            slept.append(seconds)
            now[0] += seconds

        assert energy.idle_watts(Board(), 2.0, sleep, lambda: now[0]) == pytest.approx(75.0)
        assert slept == [1.0, 2.0]

    def test_load_is_steady_for_the_time_asked(self):
        now = [0.0]

        class Board:
            def joules(self):
                return 500.0 * now[0]

            def wait(self):
                now[0] += 0.001

        def call():
            now[0] += 0.01

        joules, calls, seconds = energy.load_energy(Board(), call, 2.0, lambda: now[0])
        assert seconds >= 2.0
        assert joules / seconds == pytest.approx(500.0)
        assert calls == pytest.approx(seconds / 0.01, rel=0.1)

    def test_accuracy_with_outliers(self):
        cell = dataclasses.replace(SMALL, mask="full", dtype="float16")
        arrays = accuracy.outlier_inputs(cell, np, seed=0)
        share = np.mean(np.abs(arrays["q"].astype(np.float32)) > 6)
        assert 0 < share < 2 * accuracy.OUTLIERS
        (row,) = accuracy.measure(cell, ["cuflash_numpy"], 1, Console())
        assert 1e-5 < float(row["rmse"]) < float(row["max_error"]) < 1e-2

    def test_host_time_is_a_median_for_one_call(self):
        assert 0 < host.microseconds(lambda: None, lambda: None, enqueues=100, repeats=3) < 1000

    def test_allowed_memory_is_linear_in_length(self):
        cells = [square(128, seqlen, batch=1) for seqlen in (4096, 8192)]
        for pass_ in ("fwd", "bwd"):
            half, whole = (memory.allowed_bytes(cell, pass_) for cell in cells)
            assert whole / half == pytest.approx(2, rel=1e-3)

    def test_sampled_rows_and_keys_of_a_long_run(self):
        # The checks of the run at a million tokens, on a short one: right results pass, a shifted row does not.
        cell = memory.million_cell(300)
        arrays = random_inputs(cell, np)
        bound = providers.PROVIDERS["cuflash_numpy"].bind(cell, arrays)
        out, lse = bound.forward()
        results = {"out": out, "lse": lse, "gradients": bound.backward()}
        assert memory.sampled_row_ratio(cell, arrays, results) <= 1
        assert memory.sampled_gradient_ratio(cell, arrays, results) <= 1
        shifted = {**results, "out": np.roll(out, 1, axis=1)}
        assert memory.sampled_row_ratio(cell, arrays, shifted) > 1
        gradients = results["gradients"]
        wrong = {**results, "gradients": gradients._replace(dk=gradients.dv)}
        assert memory.sampled_gradient_ratio(cell, arrays, wrong) > 1


class TestPlots:
    def test_every_figure_is_drawn_from_records(self, tmp_path, capsys):
        names = ("cuflash", "fa4", "cuflash_sm80", "torch_flash", "standard")
        both = [(provider, pass_) for provider in names for pass_ in ("fwd", "bwd")]

        def rows(cell, **values):
            return [{**ENVIRONMENT, "provider": provider, "pass": pass_, **cell.problem_columns(), **values}
                    for provider, pass_ in both]  # fmt: skip

        speeds = [
            row for cell in GROUPS["portable"][:8] for row in rows(cell, run="r", ms_median=1, tflops=300, ok=True)
        ]
        record.append_rows(tmp_path / "speed.csv", record.SPEED_COLUMNS, speeds)
        record.append_rows(tmp_path / "memory.csv", memory.COLUMNS, rows(square(128, 1024), extra_bytes=2**20))
        names = {"standard": ("matmul q k", "softmax")}
        steps = [
            {**row, "step": step, "ms_median": 1}
            for row in rows(standard.figure_cell(), run="r")
            for step in names.get(row["provider"], ("whole pass",))
        ]
        record.append_rows(tmp_path / "standard.csv", standard.COLUMNS, steps)
        traffic = [{key: value for key, value in row.items() if key != "pass"}
                   for row in rows(hbm.CELL, gflop=1, read_bytes=1e9, written_bytes=1e9, ms=1)]  # fmt: skip
        record.append_rows(tmp_path / "hbm.csv", hbm.COLUMNS, traffic)
        record.append_rows(tmp_path / "energy.csv", energy.COLUMNS, rows(energy.CELL, joules_per_call=1))
        plot.main(["--results", str(tmp_path)])
        assert "nothing recorded" not in capsys.readouterr().out
        drawn = {path.stem for path in tmp_path.glob("*.png")}
        speeds = {"speed_fwd", "speed_bwd", "portable_fwd", "portable_bwd"}
        assert drawn == {*speeds, "memory", "standard_steps", "traffic", "energy"}

    def test_nothing_recorded_is_no_error(self, tmp_path, capsys):
        plot.main(["--results", str(tmp_path)])
        assert capsys.readouterr().out.count("nothing recorded") == len(plot.FIGURES)
