"""Processes that share a kernel cache, caches that cannot be used, and a fork after import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]

# Prints a digest of a forward and backward, and how many warnings there were.
WORK = """
import hashlib, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cuflash
    from cuflash.device import require_cupy
    cupy = require_cupy()
    def digest():
        rng = cupy.random.default_rng(3)
        q, k, v, dout = (rng.standard_normal((1, 113, 2, 48), dtype="float32").astype("float16") for _ in range(4))
        out, lse = cuflash.attention(q, k, v, causal=True, softcap=2.0, return_lse=True)
        keywords = {"causal": True, "softcap": 2.0, "deterministic": True}
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **keywords)
        arrays = (out, lse, gradients.dq, gradients.dk, gradients.dv)
        return hashlib.sha256(b"".join(cupy.asnumpy(x).tobytes() for x in arrays)).hexdigest()
    found = digest()
print(found, sum("cache" in str(w.message) for w in caught))
"""

FORK = """
import os, sys
import cupy, cuflash
child = os.fork()
if child == 0:
    q = cupy.ones((1, 64, 1, 32), "float16")
    os._exit(0 if bool((cuflash.attention(q, q, q) == 1).all()) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def start(code: str, cache: Path | str) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUPY_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """(digest, warnings about the cache) that the process printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    digest, warnings = out.split()[-2:]
    return digest, int(warnings)


@pytest.fixture(scope="module")
def digest(tmp_path_factory) -> str:
    return finish(start(WORK, tmp_path_factory.mktemp("cache")))[0]


def test_race_on_a_cold_cache(tmp_path: Path, digest: str):
    processes = [start(WORK, tmp_path) for _ in range(8)]
    assert {finish(process) for process in processes} == {(digest, 0)}


def test_cache_that_cannot_be_written(tmp_path: Path, digest: str):
    blocked = tmp_path / "a file, not a folder"
    blocked.touch()
    found, warnings = finish(start(WORK, blocked / "cache"))
    assert found == digest
    assert warnings == 1


def test_corrupt_entries_are_compiled_again(tmp_path: Path, digest: str):
    assert finish(start(WORK, tmp_path)) == (digest, 0)
    entries = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert entries, "nothing was cached"
    for path in entries:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert finish(start(WORK, tmp_path))[0] == digest


def test_fork_after_import(tmp_path: Path):
    process = start(FORK, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
