"""Compilation at run time: once per kernel, whatever the threads, the cache folder and the compiler's age."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from fake_driver import CompileException, driver, forward_views  # noqa: F401 - a fixture

from cuflash.cuda import module
from cuflash.device import DeviceInfo
from cuflash.plan import KernelSpec
from cuflash.planner import plan_forward
from cuflash.problem import Problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spec() -> KernelSpec:
    return plan_forward(Problem.build(forward_views(), kernels="sm80"), DeviceInfo.named("sm_90a")).steps[0].spec


def test_kernel_is_compiled_once(driver, spec):  # noqa: F811
    assert module.loaded(spec, 0) is None
    kernel = module.load(spec, 0)
    assert module.load(spec, 0) is kernel is module.loaded(spec, 0)
    assert driver.compiled == [("forward_sm80", ("-std=c++17", "-lineinfo"))]
    assert kernel.registers == 168


def test_devices_have_kernels_of_their_own(driver, spec):  # noqa: F811
    assert module.load(spec, 0) is not module.load(spec, 1)


def test_own_instructions_of_an_architecture_are_asked_for(driver, spec):  # noqa: F811
    module.load(KernelSpec(spec.source, spec.entry, spec.config, "sm_90a"), 0)
    assert driver.compiled[0][1][-1] == "-arch=sm_90a"


def test_eight_cold_threads_compile_once(driver, spec, monkeypatch):  # noqa: F811
    genuine, kernels, barrier = driver.compile, [], threading.Barrier(8)

    def slow(*arguments):
        time.sleep(0.05)
        return genuine(*arguments)

    def work():
        barrier.wait()
        kernels.append(module.load(spec, 0))

    monkeypatch.setattr(driver, "compile", slow)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.compiled) == 1
    assert len(kernels) == 8
    assert len(set(map(id, kernels))) == 1


def test_load_all_yields_every_kernel(driver, spec):  # noqa: F811
    specs = [KernelSpec(spec.source, spec.entry, (*spec.config, ("extra", "int", i)), spec.arch) for i in range(5)]
    assert list(module.load_all(specs, 0)) == [module.loaded(spec, 0) for spec in specs]


def test_unusable_cache_warns_once_and_works(driver, spec):  # noqa: F811
    driver.cache_error = PermissionError(13, "Permission denied", "/root/.cupy")
    with pytest.warns(RuntimeWarning, match="kernel cache cannot be used .*CUPY_CACHE_DIR"):
        module.load(spec, 0)
    assert os.environ[module.IN_MEMORY] == "1", "CuPy keeps later kernels in memory"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load(KernelSpec(spec.source, spec.entry, (), spec.arch), 0)


def test_failed_compilation_is_tried_again(driver, spec):  # noqa: F811
    driver.cache_error = CompileException("kernels_cu/forward_sm80.cu(3): error")
    with pytest.raises(RuntimeError, match=r"forward_sm80\.cu does not compile for sm_90[^$]*\.cu\(3\): error"):
        module.load(spec, 0)
    assert module.load(spec, 0).handle == 1


def test_compiler_that_is_too_old_names_the_remedy(driver, spec):  # noqa: F811
    driver.supported_archs = (80, 86)
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.0 does not know sm_90; pip install 'cuflash\[cuda13\]'"):
        module.load(spec, 0)


# Several first compilations at once: without `start_compiler` NVRTC finds its builtins in one of the threads only.
COLD_THREADS = """
import threading
from cuflash.cuda import nvrtc
barrier, failures = threading.Barrier(8), []
def work():
    barrier.wait()
    try:
        nvrtc.compile_text('extern "C" __global__ void kernel(float* x) { *x *= 2; }', "sm_80")
    except nvrtc.CompileError as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(failures))
"""


def test_first_compilations_of_eight_threads_succeed():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COLD_THREADS], env=environment, stdout=subprocess.PIPE, check=True)
    assert done.stdout.split() == [b"0"]


class TestCupyCache:
    """What the library relies on in CuPy's disk cache, on CuPy's own class."""

    @pytest.fixture
    def backend(self, tmp_path):
        from cupy.cuda._compiler_cache import DiskKernelCacheBackend

        return DiskKernelCacheBackend(str(tmp_path))

    def test_entry_that_was_changed_is_not_used(self, backend, tmp_path):
        backend.save("kernel.cubin", b"machine code", "")
        assert backend.load("kernel.cubin") == b"machine code"
        (tmp_path / "kernel.cubin").write_bytes((tmp_path / "kernel.cubin").read_bytes()[:-1])
        assert backend.load("kernel.cubin") is None

    def test_writing_leaves_nothing_but_the_entry(self, backend, tmp_path):
        backend.save("kernel.cubin", b"machine code", "")
        assert [path.name for path in tmp_path.iterdir()] == ["kernel.cubin"]

    def test_folder_that_cannot_be_written_is_an_oserror(self, backend, tmp_path):
        tmp_path.rmdir()
        with pytest.raises(OSError):
            backend.save("kernel.cubin", b"machine code", "")
