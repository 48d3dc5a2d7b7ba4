"""The README keeps its promises: two commands, code that runs, tables made from the records as they are now."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import cuflash
from benchmarks import energy, host, memory, readme
from benchmarks.record import ENVIRONMENT_COLUMNS, PROBLEM_COLUMNS, SPEED_COLUMNS, append_rows

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
FRAMEWORKS = ("cupy", "torch", "jax")


def code_blocks(language: str) -> list[str]:
    """Blocks of one language, pushed down by empty lines so that errors name the README's own lines."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * TEXT.count("\n", 0, match.start(1)) + match[1] for match in found]


def run(blocks: list[str]) -> None:
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def frameworks_of(block: str) -> list[str]:
    imported = re.findall(r"^import (.*)$", block, flags=re.MULTILINE)
    return [name for name in FRAMEWORKS if re.search(rf"\b{name}\b", " ".join(imported))]


HOST_BLOCKS = [block for block in code_blocks("python") if not frameworks_of(block)]
DEVICE_BLOCKS = [block for block in code_blocks("python") if frameworks_of(block)]


def test_first_block_is_two_commands():
    install_and_run, install_and_test = code_blocks("sh")[0].split("\n")[-3:-1]
    assert code_blocks("sh")[0].strip().count("\n") == 1
    assert "pip install ." in install_and_run and install_and_run.endswith("-m cuflash")
    assert "pip install -e '.[test]'" in install_and_test and "-m pytest" in install_and_test


def test_gpu_block_differs_by_an_extra():
    plain, gpu = code_blocks("sh")[:2]
    assert gpu.strip().split("\n")[0] == plain.strip().split("\n")[0].replace("install .", "install '.[cuda13]'")


def test_python_blocks_run_on_numpy():
    assert len(HOST_BLOCKS) >= 4
    run(HOST_BLOCKS)


def test_a_wrong_block_fails():
    with pytest.raises(AssertionError):
        run([*HOST_BLOCKS, "assert np.allclose(acc, out[0, :, 0])"])


@pytest.mark.gpu
def test_python_blocks_run_on_a_device():
    for framework in FRAMEWORKS:
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    run([HOST_BLOCKS[0], *DEVICE_BLOCKS])


def test_every_keyword_is_explained():
    keywords = list(inspect.signature(cuflash.attention).parameters)[3:]
    assert [keyword for keyword in keywords if f"`{keyword}`" not in readme.PART.sub("", TEXT)] == []


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", TEXT)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_generated_parts_are_up_to_date():
    assert readme.render(TEXT) == TEXT, "run `python -m benchmarks.readme`"


def test_every_generated_part_is_shown():
    assert {name for _, name, _, _ in readme.PART.findall(TEXT)} == set(readme.PARTS)


def test_an_old_part_is_renewed(tmp_path):
    text = "<!-- generated: energy -->\nold\n<!-- end: energy -->\n"
    assert readme.render(text, tmp_path) == text.replace("old", "No record yet: `python -m benchmarks.energy`.")


def test_no_number_is_typed():
    """Outside the generated parts the README names no measured quantity."""
    prose = readme.PART.sub("", TEXT)
    assert re.findall(r"\d[\d.,]*\s*(?:TFLOP|GB/s|TB/s|ms\b|µs|us\b|seconds|times faster|x faster|%)", prose) == []


PROBLEM = dict(zip(PROBLEM_COLUMNS, ("bfloat16", 8, 2048, 2048, 32, 32, 64, 64, "causal", "plain"), strict=True))
ENVIRONMENT = dict(zip(ENVIRONMENT_COLUMNS, ("2026-01-02T03:04:05Z", "abc", "GPU", "1", "2"), strict=True))
CELL = "d64-causal-2k"
TAKEN_ON = "<sub>GPU, driver 1, NVRTC 2, 2026-01-02, code `abc`</sub>"


def test_speed_compares_within_the_newest_run(tmp_path):
    measured = [
        ("cuflash", "old", 4, True), ("fa3", "old", 1, True),
        ("cuflash", "new", 1, True), ("torch_flash", "new", 1.5, True), ("fa3", "new", 1.2, True),
        ("fa4", "new", 0.1, False), ("cuflash_sm80", "new", 1.25, True),
    ]  # fmt: skip
    names = ("provider", "run", "ms_median", "ok")
    rows = [ENVIRONMENT | PROBLEM | {"pass": "fwd"} | dict(zip(names, values, strict=True)) for values in measured]
    append_rows(tmp_path / "speed.csv", SPEED_COLUMNS, rows)
    lines = readme.speed(tmp_path).splitlines()
    assert f"| forward | D 64, causal | 1 | 1.200 | 1.200 | 1.200 | {CELL} |" in lines
    assert f"| {CELL} | 137 | 115 (FlashAttention-3) | 1.20 |" in lines
    assert f"| {CELL} | 110 | 92 (FlashAttention-2) | 1.20 |" in lines
    assert not any("FlashAttention-4" in line for line in lines)
    assert lines[-1] == TAKEN_ON


@pytest.mark.parametrize(
    ("part", "file", "columns", "row", "line"),
    [
        ("memory", "memory.csv", memory.COLUMNS, {"extra_bytes": 1 << 20}, f"| {CELL} | – / 1 |"),
        ("host", "host_overhead.csv", host.HOST_COLUMNS, {"us_per_call": 17}, "| cuflash | cupy | backward | 17 |"),
        ("host", "compile.csv", host.COMPILE_COLUMNS, {"seconds": 0.5}, f"| {CELL} | backward | disk | 0.5 |"),
        ("energy", "energy.csv", energy.COLUMNS, {"joules_per_call": 9}, f"| cuflash | {CELL} | backward | 9 |"),
    ],
)
def test_a_record_becomes_a_line(part, file, columns, row, line, tmp_path):
    default = {"provider": "cuflash", "pass": "bwd", "arrays": "cupy", "start": "disk"}
    row = {name: value for name, value in (default | row).items() if name in columns}
    append_rows(tmp_path / file, columns, [ENVIRONMENT | PROBLEM | row])
    lines = readme.PARTS[part](tmp_path).splitlines()
    assert line in lines and lines[-1] == TAKEN_ON


def test_gpu_tests_name_what_was_skipped(tmp_path):
    entries = {"a": {"outcome": "passed"}, "b": {"outcome": "skipped", "reason": "one device"}}
    record = ENVIRONMENT | {"counts": {"passed": 1, "skipped": 1}, "tests": entries}
    (tmp_path / "gpu_tests.json").write_text(json.dumps(record))
    lines = readme.gpu_tests(tmp_path).splitlines()
    assert "| tests | 1 | 0 | 1 |" in lines and "- 1 skipped: one device" in lines and lines[-1] == TAKEN_ON
