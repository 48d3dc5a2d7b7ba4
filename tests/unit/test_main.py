"""The command line: what it prints, and that its self-check fails where attention is wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import cuflash
from cuflash import __main__ as command_line


@pytest.fixture
def short_charts(monkeypatch):
    monkeypatch.setattr(command_line, "CHART_LENGTHS", {"numpy": (64, 128)})


def test_prints_versions_checks_and_charts(short_charts, capsys):
    assert command_line.main([]) == 0
    printed = capsys.readouterr().out
    assert f"cuflash {cuflash.__version__}" in printed
    assert "backends: numpy" in printed
    assert printed.count("  ok ") == len(command_line.SELF_CHECK)
    assert "time\n" in printed
    assert "memory\n" in printed


def test_self_check_fails_where_attention_is_wrong(short_charts, monkeypatch, capsys):
    right = cuflash.attention

    def wrong(*args, **keywords):
        result = right(*args, **keywords)
        return (result[0] * result[0].dtype.type(1.05), result[1]) if keywords.get("return_lse") else result

    monkeypatch.setattr(cuflash, "attention", wrong)
    assert command_line.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_self_check_sees_every_feature():
    problems = [
        command_line.self_check_problem(keywords, "float32")[0] for keywords in command_line.SELF_CHECK.values()
    ]
    assert any(problem.dropout for problem in problems)
    assert any(problem.sinks for problem in problems)
    assert any(problem.modifiers.alibi for problem in problems)
    assert any(problem.modifiers.softcap for problem in problems)
    assert any(problem.layout.used_q and problem.layout.used_k for problem in problems)
    assert any(problem.group_size > 1 for problem in problems)


def test_standard_attention_is_attention():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 77, 2, 32), dtype=np.float32)
    expected = cuflash.attention(q, k, v, causal=True)
    np.testing.assert_allclose(command_line.standard_attention(np, q, k, v), expected, atol=1e-5)


def test_chart_scales_bars_to_the_longest():
    lines = command_line.chart([(64, "standard", 4.0, 8.0), (64, "tiled", 2.0, 1.0)]).splitlines()
    assert [line.count("█") for line in lines] == [0, 40, 20, 0, 40, 5]


def test_explain_for_a_named_device(capsys):
    assert command_line.main(["explain", "--causal", "--head-dim", "64", "--device", "sm_90a"]) == 0
    printed = capsys.readouterr().out
    assert "forward on NVIDIA H200" in printed
    assert "forward_sm90" in printed
    assert "backward on NVIDIA H200" in printed


@pytest.mark.parametrize("arguments", [["--window", "5", "0"], ["--sinks", "--alibi-slopes"], ["--dropout-p", "0.1"]])
def test_explain_takes_the_keywords_of_attention(arguments: list[str], capsys):
    assert command_line.main(["explain", "--device", "sm_80", *arguments]) == 0
    assert "forward_sm80" in capsys.readouterr().out


def test_errors_of_the_user_are_one_line(capsys):
    assert command_line.main(["explain", "--heads", "6", "--kv-heads", "4"]) == 2
    assert capsys.readouterr().err == "error: k has 4 heads; q's 6 heads need a divisor of 6\n"


def test_bench_without_a_checkout_compares_here(short_charts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(["bench"]) == 0
    assert "standard" in capsys.readouterr().out
    assert command_line.main(["bench", "--cells", "speed"]) == 2


def test_bench_in_a_checkout_is_the_benchmarks(capsys):
    assert command_line.main(["bench", "--dry-run", "--cells", "smoke", "--providers", "cuflash_numpy"]) == 0
    assert "d64-full-113x203-float32" in capsys.readouterr().out


def test_needs_nothing_but_the_base_dependencies():
    program = """
import sys
for name in ("cupy", "torch", "jax", "rich", "matplotlib", "scipy"):
    sys.modules[name] = None  # importing it raises ImportError
from cuflash import __main__
__main__.CHART_LENGTHS = {"numpy": (64,)}
assert __main__.main([]) == 0
assert __main__.main(["warmup"]) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
