"""Attention on the host twin, through the library's own plan and launch: only the driver underneath is another.

``cuflash.cuda.launch`` compiles through ``module.load`` and launches through CuPy's driver API. Here both are
stand-ins, so that the grids, the shared memory and every byte of the parameters are the product's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

import cuflash.plan_sm90
import cuflash.planner
from cuflash.cuda import launch, source, tensor_map
from cuflash.device import DeviceInfo
from cuflash.plan import KernelSpec, Plan
from cuflash.problem import ArraySpec, Problem, View
from cuflash.testing import Arrays, numpy_dtype
from emulated import tensor_maps, twin
from emulated.twin import Memory, Schedule

BAND = 256  # poisoned bytes before and after every array, and what arrays are aligned to
CHOICES = (  # of a row of tiles
    (cuflash.planner, "row_for"),
    (cuflash.plan_sm90, "forward_row"),
    (cuflash.plan_sm90, "backward_row"),
    (cuflash.plan_sm90, "queries_row"),
)
POISON = 0xFF  # as a float of any width: NaN; as an int32: -1


@dataclass(frozen=True)
class Emulation:
    """How to run: for which device, with what tiles, in which interleaving, and with what planted bug.

    ``tile`` overrides fields of the planned row of tiles; ``sm_count`` those of the device, so that persistent kernels
    have more tiles than blocks; ``edit`` changes a kernel's text before it is compiled.
    """

    arch: str = "sm_80"
    sm_count: int = 3
    tile: tuple[tuple[str, int], ...] = ()
    schedule: Schedule = Schedule()
    edit: Callable[[KernelSpec, str], str] = field(default=lambda spec, text: text)

    @property
    def device(self) -> DeviceInfo:
        return replace(DeviceInfo.named(self.arch), sm_count=self.sm_count)

    def plan_forward(self, problem: Problem) -> Plan:
        with self._overridden_tiles():
            return cuflash.planner.plan_forward(problem.without_seed(), self.device)

    def plan_backward(self, problem: Problem) -> Plan:
        with self._overridden_tiles():
            return cuflash.planner.plan_backward(problem.without_seed(), self.device)

    def sources(self, plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
        """What `twin.compile_ahead` takes, for every kernel of a plan."""
        return [(self.text(step.spec), (step.spec.entry,)) for step in plan.steps]

    def text(self, spec: KernelSpec) -> str:
        search_path = (twin.TWIN_FOLDER, source.kernels_folder())
        return self.edit(spec, f"{source.prelude(spec)}\n{source.flatten(spec.source, search_path)}\n")

    def library(self, spec: KernelSpec) -> Path:
        return twin.compile_text(self.text(spec), (spec.entry,))

    @contextmanager
    def _overridden_tiles(self) -> Iterator[None]:
        def overridden(choose: Callable[..., object]) -> Callable[..., object]:
            return lambda *args, **keywords: replace(choose(*args, **keywords), **dict(self.tile))

        with ExitStack() as stack:
            for planner, name in CHOICES if self.tile else ():
                stack.enter_context(mock.patch.object(planner, name, overridden(getattr(planner, name))))
            yield


@dataclass
class Driver:
    """The part of CuPy that a launch uses, on the twin."""

    emulation: Emulation
    memory: Memory = Memory([], [])
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: int = 8

    def load(self, spec: KernelSpec, device_index: int) -> SimpleNamespace:
        return SimpleNamespace(handle=twin.Kernel(self.emulation.library(spec), spec.entry))

    def funcSetAttribute(self, kernel: twin.Kernel, attribute: int, value: int) -> None:  # noqa: N802
        """Blocks get what the launch asks for."""

    def ctxGetCurrent(self) -> int:  # noqa: N802
        return 1

    def launchKernel(  # noqa: N802
        self, kernel: twin.Kernel, grid: int, _y: int, _z: int, threads: int, _by: int, _bz: int, shared_bytes: int,
        stream: int, arguments: int, extra: int,
    ) -> None:  # fmt: skip
        kernel.launch(
            ctypes.c_void_p.from_address(arguments).value,
            grid=grid,
            threads=threads,
            shared_bytes=shared_bytes,
            memory=self.memory,
            schedule=self.emulation.schedule,
        )

    @property
    def cupy(self) -> SimpleNamespace:
        return SimpleNamespace(cuda=SimpleNamespace(driver=self, runtime=SimpleNamespace(setDevice=None)))


def problem_of(problem: Problem, arrays: Arrays) -> Problem:
    """The same problem for arrays that lie in memory as these do."""
    specs = {name: ArraySpec.of(view_of(getattr(arrays, name))) for name in ("q", "k", "v", "dout")}
    return replace(problem, **specs)


def forward(problem: Problem, arrays: Arrays, emulation: Emulation = Emulation()) -> dict[str, np.ndarray]:
    """``out`` and ``lse``, as the forward kernel writes them."""
    memory = GuardedMemory()
    results = {
        "out": memory.empty(problem.out_shape, numpy_dtype(problem.dtype)),
        "lse": memory.empty(problem.lse_shape, np.float32),
    }
    inputs = {name: getattr(arrays, name) for name in ("q", "k", "v")} | memory.copies(arrays.features)
    _run(emulation, emulation.plan_forward(problem), problem, inputs, results, memory)
    return results


def backward(
    problem: Problem, arrays: Arrays, out: np.ndarray, lse: np.ndarray, emulation: Emulation = Emulation()
) -> dict[str, np.ndarray]:
    """``dq``, ``dk``, ``dv`` and, with sinks, ``dsinks``, as the backward kernels write them."""
    memory = GuardedMemory()
    dtype = numpy_dtype(problem.dtype)
    results = {f"d{name}": memory.empty(getattr(problem, name).shape, dtype) for name in ("q", "k", "v")}
    if problem.sinks:
        results["dsinks"] = memory.empty((problem.num_heads,), np.float32)
    inputs = {name: getattr(arrays, name) for name in ("q", "k", "v", "dout")}
    inputs |= memory.copies(arrays.features | {"out": out, "lse": lse, "dlse": arrays.dlse})
    _run(emulation, emulation.plan_backward(problem), problem, inputs, results, memory)
    return results


def _run(
    emulation: Emulation,
    plan: Plan,
    problem: Problem,
    inputs: Mapping[str, np.ndarray],
    results: Mapping[str, np.ndarray],
    memory: GuardedMemory,
) -> None:
    driver = Driver(emulation)
    counter = memory.zeros((1,), np.int32)
    counters = SimpleNamespace(address=lambda stream: counter.ctypes.data)
    with (
        mock.patch.object(launch, "require_cupy", lambda: driver.cupy),
        mock.patch.object(launch.module, "load", driver.load),
        mock.patch.object(launch, "tile_counters", lambda device_index: counters),
        mock.patch.object(tensor_map, "_encode_tiled", lambda: tensor_maps.encode_tiled),
    ):
        prepared = launch.Launch(plan, device_index=0)
        workspace = memory.empty((prepared.workspace_floats,), np.float32)
        workspace.fill(np.nan)  # as a count a large number, where POISON would be one less than the zero it should be
        driver.memory = Memory(list(inputs.values()), [*results.values(), workspace, counter])
        views = {name: view_of(array) for name, array in (*inputs.items(), *results.items())}
        pointers = {name: view.pointer for name, view in views.items()}
        prepared.bind(views)(pointers, workspace.ctypes.data, problem.dropout, stream=0)
    assert counter == 0, "the kernel does not leave its tile counter at zero for the next launch"
    memory.check()


def view_of(array: np.ndarray) -> View:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(array.ctypes.data, array.shape, strides, array.dtype.name)


class GuardedMemory:
    """Poisoned arrays between poisoned bands, aligned as allocations on a device are."""

    def __init__(self) -> None:
        self._bands: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.full(size + 3 * BAND, POISON, np.uint8)
        start = BAND + -memory.ctypes.data % BAND
        self._bands += [memory[:start], memory[start + size :]]
        return memory[start : start + size].view(dtype).reshape(shape)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def copies(self, arrays: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        """Copies of the arrays that are given: a read past their ends gives poison."""
        copies = {name: self.empty(array.shape, array.dtype) for name, array in arrays.items() if array is not None}
        for name, copy in copies.items():
            copy[...] = arrays[name]
        return copies

    def check(self) -> None:
        for band in self._bands:
            assert (band == POISON).all(), "a kernel wrote outside of an array"
