"""What plans know about GPUs."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from types import SimpleNamespace

import pytest

from cuflash import device
from cuflash.device import KB, DeviceInfo

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


@pytest.mark.parametrize("arch", ARCHS)
def test_named_devices_are_consistent(arch):
    info = DeviceInfo.named(arch)
    assert info.arch == arch
    assert arch.startswith(f"sm_{info.major}{info.minor}")
    assert info.portable_arch == arch.removesuffix("a")
    assert info.shared_per_sm == info.shared_per_block + KB


def test_unknown_arch_is_refused():
    with pytest.raises(ValueError, match="arch is 'sm_75'; it must be one of sm_80"):
        DeviceInfo.named("sm_75")


@pytest.mark.parametrize(
    ("threads", "shared_kb", "registers", "blocks"),
    [
        (128, 0, 0, 16),  # threads
        (128, 80, 0, 2),  # shared memory
        (128, 114, 0, 1),  # the reserved KB of each block
        (128, 0, 255, 2),  # registers
        (256, 0, 129, 1),  # registers come in groups of 8
        (256, 0, 128, 2),
        (1024, 300, 0, 0),
    ],
)
def test_blocks_per_sm(threads, shared_kb, registers, blocks):
    assert DeviceInfo.named("sm_90a").blocks_per_sm(threads, shared_kb * KB, registers) == blocks


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_86"),
        ("sm_89", "sm_86"),
        ("sm_90a", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_120", "sm_86"),
    ],
)
def test_tile_family(arch, family):
    assert DeviceInfo.named(arch).tile_family == family


class Properties:
    """A runtime whose one device has these properties."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, nvrtc: tuple[int, int] = (13, 0), **properties: object):
        self.calls, self.nvrtc = 0, SimpleNamespace(getVersion=lambda: nvrtc)
        self.properties = {
            "name": b"NVIDIA H200",
            "major": 9,
            "minor": 0,
            "multiProcessorCount": 132,
            "sharedMemPerBlockOptin": 227 * KB,
            "sharedMemPerMultiprocessor": 228 * KB,
            "regsPerMultiprocessor": 65536,
            "maxThreadsPerMultiProcessor": 2048,
            "l2CacheSize": 60 * 1024 * KB,
        } | properties

    def getDeviceProperties(self, index):  # noqa: N802
        self.calls += 1
        if index:
            raise self.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return self.properties


@pytest.fixture
def runtime(monkeypatch):
    def use(**properties):
        fake = Properties(**properties)
        cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=fake, nvrtc=fake.nvrtc))
        monkeypatch.setattr(device, "require_cupy", lambda: cupy)
        return fake

    device._query.cache_clear()
    yield use
    device._query.cache_clear()


def test_current_is_asked_once(runtime):
    fake = runtime()
    assert DeviceInfo.current(0) == DeviceInfo.current(0) == DeviceInfo.named("sm_90a")
    assert fake.calls == 1


@pytest.mark.parametrize("nvrtc", [(12, 9), (13, 0)])
def test_compiler_that_knows_hopper(runtime, nvrtc):
    runtime(nvrtc=nvrtc)
    assert DeviceInfo.current(0).has_wgmma


def test_compiler_that_does_not_know_hopper_means_portable_kernels_and_one_warning(runtime):
    runtime(nvrtc=(12, 8))
    with pytest.warns(RuntimeWarning, match=r"NVRTC 12\.8 does not compile the Hopper kernels"):
        info = DeviceInfo.current(0)
    assert (info.arch, info.has_wgmma, info.tile_family) == ("sm_90", False, "sm_90")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeviceInfo.current(0)


def test_rates_of_an_unknown_product_are_unknown(runtime):
    runtime(name=b"NVIDIA Thing", major=12, minor=1)
    assert (DeviceInfo.current(0).arch, DeviceInfo.current(0).flops) == ("sm_121", None)


def test_too_old_device_is_refused(runtime):
    runtime(name=b"Tesla T4", major=7, minor=5)
    with pytest.raises(RuntimeError, match="Tesla T4 is sm_75; cuflash needs sm_80"):
        DeviceInfo.current(0)


def test_missing_device_is_named(runtime):
    runtime()
    with pytest.raises(RuntimeError, match="CUDA device 1 cannot be used"):
        DeviceInfo.current(1)


def test_missing_cupy_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"pip install 'cuflash\[cuda13\]'"):
        device.require_cupy()


def test_cache_folder_that_cannot_be_made_is_replaced(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="CuPy's kernel cache cannot be made .*set CUPY_CACHE_DIR"):
        device._provide_cache_folder()
    replacement = os.environ["CUPY_CACHE_DIR"]
    assert os.path.dirname(replacement) == str(tmp_path)
    assert os.path.isdir(replacement)


def test_cache_folder_is_made_where_it_can_be(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "new" / "cache"))
    device._provide_cache_folder()
    assert os.environ["CUPY_CACHE_DIR"] == str(tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").is_dir()
