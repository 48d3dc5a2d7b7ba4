"""The house rules: each a function from a source tree to its violations, each shown planted ones that it must find."""

from __future__ import annotations

import ast
import configparser
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rooms from the bottom up. A module imports rooms below its own, and modules of its own room.
ORDER = (
    ("layouts", "masks", "modifiers", "block_mask", "dropout"),
    ("problem",),
    ("device", "tiles"),
    ("tiles_sm90",),
    ("plan",),
    ("plan_sm90",),
    ("planner",),
    ("cuda.source",),
    ("cuda.module",),
    ("cuda.tensor_map", "cuda.nvrtc", "cuda.counters"),
    ("cuda.launch",),
    ("backends",),
    ("arrays",),
    ("dispatch", "merging"),
    ("api",),
    ("testing",),
    ("__init__",),
    ("interop", "distributed", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

TOP_FILES = {"setup.cfg", "pyproject.toml", "LICENSE", "README.md", "NOTES.md"}
TOP_FOLDERS = {"cuflash", "kernels_cu", "tests", "benchmarks"}
FRAMEWORK_FILES = {  # where a framework may be named in code
    "torch": {"cuflash/arrays.py", "cuflash/interop/torch.py", "cuflash/interop/flash_attn.py"},
    "jax": {"cuflash/arrays.py", "cuflash/interop/jax.py"},
}
OUR_VARIABLES = {"CUFLASH_BACKEND", "CUFLASH_LOG", "CUFLASH_CHECK"}
THEIR_VARIABLES = {"CUPY_CACHE_DIR"}
LONGEST_FILE = 500
LONGEST_LINE = {".py": 120, ".cu": 140, ".cuh": 140}
PTX = re.compile(r"\basm\b|\b(?:mma\.sync|wgmma\.|cp\.async|ldmatrix\.|mbarrier\.)")


def sources(root: Path, *suffixes: str) -> list[Path]:
    files = (path for folder in sorted(TOP_FOLDERS) for path in sorted((root / folder).rglob("*")))
    return [path for path in files if path.suffix in suffixes]


def library(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Name from the root and syntax tree of every Python file of the package."""
    for path in sorted((root / "cuflash").rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_bytes())


def room_of(module: str) -> str:
    """``cuflash.backends.numpy_backend`` is in the room ``backends``, ``cuflash.cuda.launch`` in ``cuda.launch``."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[:1] == ["cuda"] else parts[:1]) or "__init__"


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file; lazy imports are dependencies too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def texts(tree: ast.Module) -> Iterator[str]:
    """String constants that the program can use: docstrings are not among them."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def import_direction(root: Path) -> Iterator[str]:
    for name, tree in library(root):
        room = room_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if room != "cuda" and room not in RANK:
            yield f"{name} is in no room of ORDER"
            continue
        for imported in imports(tree):
            # `from cuflash import api` names a room, `from cuflash import attention` the package itself.
            target = room_of(imported) if imported.split(".")[0] == "cuflash" else room
            target = target if target in RANK else "__init__"
            if target != room and RANK[target] >= RANK.get(room, 0):
                yield f"{name} imports {imported}: {room} is not above {target}"


def frameworks_in_their_files(root: Path) -> Iterator[str]:
    for name, tree in library(root):
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used = {text.split(".")[0] for text in (*imports(tree), *loaded)}
        yield from (f"{name} names {f}" for f, allowed in FRAMEWORK_FILES.items() if f in used and name not in allowed)


def assembly_in_arch(root: Path) -> Iterator[str]:
    for path in sources(root, ".cu", ".cuh"):
        name = path.relative_to(root).as_posix()
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        if name.startswith("kernels_cu/") and not name.startswith("kernels_cu/arch/") and re.search(r"\basm\b", code):
            yield f"{name} has inline assembly"
    for name, tree in library(root):
        yield from (f"{name} has PTX text: {text!r}" for text in texts(tree) if PTX.search(text))


def top_level(root: Path) -> Iterator[str]:
    ignore = root / ".gitignore"
    ignored = [line.strip("/") for line in ignore.read_text().split()] if ignore.exists() else []
    for path in sorted(root.iterdir()):
        generated = path.name.startswith(".") or any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
        if not generated and path.name not in TOP_FILES | TOP_FOLDERS:
            yield f"{path.name} is not one of the top level's names"


def file_sizes(root: Path) -> Iterator[str]:
    for path in sources(root, *LONGEST_LINE):
        lines = path.read_text().count("\n")
        if lines > LONGEST_FILE:
            yield f"{path.relative_to(root)} has {lines} lines; at most {LONGEST_FILE} fit one room"


def environment_variables(root: Path) -> Iterator[str]:
    for name, tree in library(root):
        named = {variable for text in texts(tree) for variable in re.findall(r"\bCUFLASH_[A-Z_]+", text)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Call, ast.Subscript)):
                named |= set(re.findall(r"^(?:os\.)?(?:environ|getenv)[.\w]*[\[(]['\"](\w+)", ast.unparse(node)))
        unknown = sorted(named - OUR_VARIABLES - THEIR_VARIABLES)
        yield from (f"{name} knows the environment variable {variable}" for variable in unknown)


def includes_resolve(root: Path) -> Iterator[str]:
    kernels = root / "kernels_cu"
    for path in sorted(kernels.rglob("*.cu*")):
        name = path.relative_to(root)
        for include in re.findall(r"^\s*#include\s+(.*?)\s*(?://.*)?$", path.read_text(), flags=re.MULTILINE):
            if not (kernels / include.strip('"')).is_file():
                yield f"{name} includes {include}: there is no such file under kernels_cu/"
        if path.suffix == ".cuh" and "#pragma once" not in path.read_text():
            yield f"{name} lacks #pragma once"


def packages_are_listed(root: Path) -> Iterator[str]:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    listed = set(config["options"]["packages"].split()) - {"cuflash.kernels_cu"}
    folders = {path.parent.relative_to(root) for path in (root / "cuflash").rglob("*.py")}
    present = {folder.as_posix().replace("/", ".") for folder in folders}
    yield from (f"setup.cfg and cuflash/ differ in the package {package}" for package in sorted(listed ^ present))


def style(root: Path) -> Iterator[str]:
    for path in sources(root, *LONGEST_LINE):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            place = f"{path.relative_to(root)}:{number}"
            if len(line) > LONGEST_LINE[path.suffix]:
                yield f"{place} has {len(line)} characters"
            if line != line.rstrip() or "\t" in line:
                yield f"{place} has a tab or ends in a space"
    for path in sources(root, ".py"):
        yield from (f"{path.relative_to(root)}{fault}" for fault in python_faults(path.read_text()))
    for name, tree in library(root):
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        if name != "cuflash/__main__.py" and any(isinstance(f, ast.Name) and f.id == "print" for f in calls):
            yield f"{name} prints"


def python_faults(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    if len(tree.body) > 1 and "from __future__ import annotations" not in text:
        yield " lacks `from __future__ import annotations`"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and re.match(r"[a-zA-Z]*'", token.string) and '"' not in token.string:
            yield f":{token.start[0]} has single quotes"
        if token.type == tokenize.COMMENT and re.search(r"\b(?:TO" r"DO|FIX" r"ME|XXX)\b", token.string):
            yield f":{token.start[0]} puts work off"
    lines = text.splitlines()
    words = re.findall(r"\w+", re.sub(r"^\s*(?:from|import)\b[^(\n]*(?:\([^)]*\))?", "", text, flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "noqa: F401" not in lines[node.lineno - 1]:
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names} - {"annotations", *words}
            yield from (f":{node.lineno} imports {name} in vain" for name in sorted(bound))


CHECKS: tuple[Callable[[Path], Iterator[str]], ...] = (
    import_direction,
    frameworks_in_their_files,
    assembly_in_arch,
    top_level,
    file_sizes,
    environment_variables,
    includes_resolve,
    packages_are_listed,
    style,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rule_holds(check):
    assert list(check(ROOT)) == []


FUTURE = "from __future__ import annotations\n"
PLANTED = [
    (import_direction, "cuflash/masks.py", "from cuflash.problem import Problem"),
    (import_direction, "cuflash/masks.py", "from cuflash import problem"),
    (import_direction, "cuflash/masks.py", "import cuflash.dropout"),
    (import_direction, "cuflash/plan.py", "def later():\n    from cuflash.api import attention"),
    (import_direction, "cuflash/cuda/source.py", "from cuflash.cuda.launch import pack"),
    (import_direction, "cuflash/plan.py", "from cuflash import attention"),
    (import_direction, "cuflash/helpers.py", "import math"),
    (frameworks_in_their_files, "cuflash/api.py", "import torch"),
    (frameworks_in_their_files, "cuflash/interop/torch.py", "def f():\n    from jax import numpy"),
    (assembly_in_arch, "kernels_cu/tile/copy.cuh", '/* fast */ asm volatile("nop;");'),
    (assembly_in_arch, "cuflash/cuda/source.py", "PROLOGUE = 'asm volatile(\"nop;\");'"),
    (top_level, "examples/first.py", ""),
    (file_sizes, "kernels_cu/forward_sm80.cu", "\n" * 501),
    (environment_variables, "cuflash/plan.py", "import os\nFAST = os.environ.get('CUFLASH_FAST')"),
    (environment_variables, "cuflash/plan.py", "from os import environ\nFAST = environ['HOME']"),
    (includes_resolve, "kernels_cu/forward_sm80.cu", '#include "../arch/common.cuh"'),
    (includes_resolve, "kernels_cu/forward_sm80.cu", "#include <cuda_fp16.h>  // half"),
    (includes_resolve, "kernels_cu/tile/copy.cuh", "struct Copy {};"),
    (packages_are_listed, "cuflash/extra/__init__.py", ""),
    (style, "cuflash/plan.py", FUTURE + f"WIDE = {'1' * 120}"),
    (style, "cuflash/plan.py", FUTURE + "x = 1 "),
    (style, "cuflash/plan.py", FUTURE + "print(1)"),
    (style, "cuflash/plan.py", FUTURE + "x = 'single'"),
    (style, "cuflash/plan.py", FUTURE + "import os, sys\nx = sys.path"),
    (style, "cuflash/plan.py", FUTURE + "x = 1  # TO" + "DO: two"),
    (style, "cuflash/plan.py", "import sys\nx = sys.path"),
]


@pytest.mark.parametrize(("check", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_finds_a_planted_violation(check, path, text, tmp_path):
    write(tmp_path / "setup.cfg", "[options]\npackages =\n    cuflash\n    cuflash.cuda\n    cuflash.interop\n")
    write(tmp_path / "cuflash" / "__init__.py", "")
    write(tmp_path / "cuflash" / "cuda" / "module.py", FUTURE + "from cuflash.plan import Plan\nplan: Plan\n")
    write(tmp_path / "cuflash" / "interop" / "torch.py", FUTURE + "import torch\nTensor = torch.Tensor\n")
    write(tmp_path / "kernels_cu" / "arch" / "common.cuh", '#pragma once\n#define WAIT asm volatile("nop;")\n')
    assert list(check(tmp_path)) == []
    write(tmp_path / path, text)
    (found,) = check(tmp_path)
    assert path.split("/")[0] in found or "cuflash." in found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_numpy_needs_no_other_framework():
    """On NumPy arrays cuflash neither needs nor loads CuPy, PyTorch or JAX."""
    program = """
import sys
for name in ("cupy", "torch", "jax"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, cuflash
q = np.ones((1, 3, 2, 4), np.float32)
assert np.allclose(cuflash.attention(q, q, q), 1)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
