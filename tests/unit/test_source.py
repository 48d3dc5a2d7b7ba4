"""Kernel text: includes flattened once, lines kept, configurations generated."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from cuflash.cuda import source
from cuflash.device import DeviceInfo
from cuflash.plan import CONFIG_FIELDS, KernelSpec
from cuflash.planner import plan_passes
from cuflash.problem import Problem, View


def write(folder, **files: str):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_cu", ".cu")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_headers_are_included_once_and_lines_are_kept(tmp_path):
    folder = write(
        tmp_path / "kernels",
        main_cu='// first\n#include "tile/a.cuh"\n#include "tile/b.cuh"\nlast',
        tile__a_cuh='#pragma once\n#include "tile/b.cuh"\nint a;',
        tile__b_cuh="#pragma once\nint b;",
    )
    assert source.flatten("main.cu", (folder,)).splitlines() == [
        '#line 1 "kernels/main.cu"',
        "// first",
        '#line 1 "kernels/tile/a.cuh"',
        "",
        '#line 1 "kernels/tile/b.cuh"',
        "",
        "int b;",
        '#line 3 "kernels/tile/a.cuh"',
        "int a;",
        '#line 3 "kernels/main.cu"',
        '#line 4 "kernels/main.cu"',
        "last",
    ]


def test_headers_without_pragma_once_are_repeated(tmp_path):
    folder = write(tmp_path, main_cu='#include "x.cuh"\n#include "x.cuh"', x_cuh="F(X)")
    assert source.flatten("main.cu", (folder,)).count("F(X)") == 2


def test_first_folder_of_the_search_path_wins(tmp_path):
    front = write(tmp_path / "front", arch__common_cuh="int host;")
    back = write(tmp_path / "back", main_cu='#include "arch/common.cuh"', arch__common_cuh="int device;")
    text = source.flatten("main.cu", (front, back))
    assert "int host;" in text
    assert "int device;" not in text
    assert '#line 1 "front/arch/common.cuh"' in text


def test_missing_include_says_who_wants_it(tmp_path):
    folder = write(tmp_path / "kernels", main_cu='\n#include "gone.cuh"')
    with pytest.raises(FileNotFoundError, match=r"gone\.cuh included by kernels/main\.cu:2 is in none of"):
        source.flatten("main.cu", (folder,))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to see what a compiler reports")
def test_compiler_messages_name_file_and_line(tmp_path):
    files = {"main_cu": '\n#include "a.cuh"\n\nundeclared_main();', "a_cuh": "\n\nundeclared_a();"}
    folder = write(tmp_path / "kernels", **files)
    flat = tmp_path / "flat.cpp"
    flat.write_text(source.flatten("main.cu", (folder,)))
    messages = subprocess.run(["g++", "-fsyntax-only", str(flat)], capture_output=True, text=True, check=False).stderr
    assert re.search(r"kernels/a\.cuh:3.*", messages)
    assert re.search(r"kernels/main\.cu:4.*", messages)


def test_text_does_not_depend_on_the_place_of_installation(tmp_path):
    files = {"main_cu": '#include "a.cuh"', "a_cuh": "int a;"}
    here, there = write(tmp_path / "here" / "kernels_cu", **files), write(tmp_path / "there" / "kernels_cu", **files)
    assert source.flatten("main.cu", (here,)) == source.flatten("main.cu", (there,))


def test_packaged_kernels_are_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PACKAGE", tmp_path / "cuflash")
    assert source.kernels_folder() == tmp_path / "kernels_cu"
    (tmp_path / "cuflash" / "kernels_cu").mkdir(parents=True)
    assert source.kernels_folder() == tmp_path / "cuflash" / "kernels_cu"


def specs() -> list[KernelSpec]:
    views = {name: View.of((1, 100, 2, 64), "float16") for name in "qkv"} | {"sinks": View.of((2,), "float32")}
    device = DeviceInfo.named("sm_90a")
    problems = [Problem.build(views, causal=True, kernels=kernels) for kernels in ("sm90", "sm80")]
    wide = {name: View.of((1, 100, 2, 256), "float16") for name in "qkv"}
    problems.append(Problem.build(wide, kernels="sm90"))
    grouped = {name: View.of((1, 4096, 2 if name == "q" else 1, 128), "float16") for name in "qkv"}
    problems.append(Problem.build(grouped, causal=True, kernels="sm90"))
    return [step.spec for problem in problems for plan in plan_passes(problem, device) for step in plan.steps]


def test_every_kernel_has_a_file_and_an_entry_point():
    assert {spec.entry for spec in specs()} == set(CONFIG_FIELDS)
    for spec in specs():
        text = source.translation_unit(spec)
        assert re.search(rf"^(CLUSTER_)?KERNEL\(.*\) {spec.entry}\(", text, flags=re.MULTILINE)
        assert not re.search(r"^\s*#\s*include", text, flags=re.MULTILINE)
        assert "#pragma once" not in text


def test_prelude_comes_first_and_holds_the_whole_configuration():
    for spec in specs():
        text = source.translation_unit(spec)
        assert text.startswith(source.prelude(spec))
        values = [name for name, kind, _ in spec.config if kind != "class"]
        assert re.findall(r"static constexpr \w+ (\w+) = \w+;", source.prelude(spec)) == values
