"""Launches the kernels of a plan: the struct of kernels_cu/params.cuh as bytes, with the addresses of each call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cuflash.cuda import module, tensor_map
from cuflash.cuda.counters import tile_counters
from cuflash.device import require_cupy
from cuflash.dropout import Dropout
from cuflash.plan import Plan
from cuflash.problem import View

POINTER = np.uint64
ROWS = np.dtype(
    [("data", POINTER), ("batch_stride", np.int64), ("row_stride", np.int64), ("head_stride", np.int64)], align=True
)
SHAPE = np.dtype(
    [
        ("used_q", POINTER),
        ("used_k", POINTER),
        ("batch", np.int32),
        ("num_heads", np.int32),
        ("num_kv_heads", np.int32),
        ("group_size", np.int32),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("head_dim", np.int32),
        ("head_dim_v", np.int32),
        ("window_left", np.int32),
        ("window_right", np.int32),
        ("top_left", np.int32),
        ("section_heads", np.int32),
    ],
    align=True,
)
SCORE = np.dtype(
    [
        ("alibi_slopes", POINTER),
        ("sinks", POINTER),
        ("alibi_batch_stride", np.int64),
        ("scale", np.float32),
        ("softcap", np.float32),
    ],
    align=True,
)
DROPOUT_KEY = np.dtype(
    [
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("offset", np.uint32),
        ("threshold", np.uint32),
        ("scale", np.float32),
    ],
    align=True,
)
_COMMON = [("shape", SHAPE), ("score", SCORE), ("dropout", DROPOUT_KEY)]
FORWARD_PARAMS = np.dtype([*((name, ROWS) for name in ("q", "k", "v", "out")), ("lse", POINTER), *_COMMON], align=True)
BACKWARD_PARAMS = np.dtype(
    [
        *((name, ROWS) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, POINTER) for name in ("lse", "dlse", "row_lse", "row_delta", "dq_accum", "dkv_accum")),
        *((name, POINTER) for name in ("dsinks", "dq_turn", "dq_done")),
        ("tile_counter", POINTER),
        ("padded_seqlen_q", np.int32),
        ("padded_seqlen_k", np.int32),
        ("num_tiles", np.int32),
        *_COMMON,
    ],
    align=True,
)
TENSOR_MAP = np.dtype(("V", tensor_map.BYTES))
_MAPS = [(name, TENSOR_MAP) for name in ("q", "k", "v", "out")]
_BEHIND_MAPS = np.dtype([("lse", POINTER), ("tile_counter", POINTER), *_COMMON], align=True)
_PADDING = -_BEHIND_MAPS.itemsize % tensor_map.ALIGNMENT  # the struct is as aligned as its maps
FORWARD_SM90_PARAMS = np.dtype(
    [*_MAPS, ("lse", POINTER), ("tile_counter", POINTER), *_COMMON, ("padding", np.dtype(("V", _PADDING)))], align=True
)
BACKWARD_SM90_PARAMS = np.dtype(
    [
        *((name, TENSOR_MAP) for name in ("q", "k", "v", "dout", "dk", "dv")),
        ("common", BACKWARD_PARAMS),
        ("padding", np.dtype(("V", -BACKWARD_PARAMS.itemsize % tensor_map.ALIGNMENT))),
    ],
    align=True,
)
_QUERIES_MAPS = [(name, TENSOR_MAP) for name in ("q", "k", "v", "dout", "dq")]
BACKWARD_QUERIES_SM90_PARAMS = np.dtype([*_QUERIES_MAPS, ("rest", BACKWARD_SM90_PARAMS)], align=True)
STRUCTS = {
    "Rows": ROWS,
    "Shape": SHAPE,
    "Score": SCORE,
    "DropoutKey": DROPOUT_KEY,
    "ForwardParams": FORWARD_PARAMS,
    "BackwardParams": BACKWARD_PARAMS,
    "ForwardSm90Params": FORWARD_SM90_PARAMS,
    "BackwardSm90Params": BACKWARD_SM90_PARAMS,
    "BackwardQueriesSm90Params": BACKWARD_QUERIES_SM90_PARAMS,
}
INNER_STRUCTS = ("rest", "common")  # parts of a struct that other kernels of the pass take alone
PARAMS = {  # by kernel; those around the main ones take the innermost part
    "forward_sm80": FORWARD_PARAMS,
    "forward_sm90": FORWARD_SM90_PARAMS,
    "backward_sm80": BACKWARD_PARAMS,
    "backward_sm90": BACKWARD_SM90_PARAMS,
    "backward_keys_sm90": BACKWARD_SM90_PARAMS,
    "backward_queries_sm90": BACKWARD_QUERIES_SM90_PARAMS,
}
PERSISTENT = ("forward_sm90", "backward_sm90")  # draw their tiles from a counter
MAX_MAPS = 256  # tensor maps remembered per operand and layout: one of every layer of a model, again at every step
OPERANDS_IN_STRUCTS = {
    "seqused_q": ("shape", "used_q"),
    "seqused_k": ("shape", "used_k"),
    "alibi_slopes": ("score", "alibi_slopes"),
    "sinks": ("score", "sinks"),
}

_put_strides = struct.Struct("<qqq").pack_into


def constants(plan: Plan) -> bytes:
    """Return the parameter struct of a plan without addresses, strides and seed: those belong to a call."""
    problem, layout, mask = plan.problem, plan.problem.layout, plan.problem.mask
    struct = np.zeros((), PARAMS[plan.main_entry])
    params = struct
    while inner := [name for name in params.dtype.names if name in INNER_STRUCTS]:
        params = params[inner[0]]
    for name, value in {
        "batch": layout.batch,
        "num_heads": problem.num_heads,
        "num_kv_heads": problem.num_kv_heads,
        "group_size": problem.group_size,
        "seqlen_q": layout.seqlen_q,
        "seqlen_k": layout.seqlen_k,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "window_left": mask.left or 0,
        "window_right": mask.right or 0,
        "top_left": mask.top_left,
        "section_heads": plan.section_heads,
    }.items():
        params["shape"][name] = value
    params["score"]["alibi_batch_stride"] = problem.num_heads if problem.modifiers.alibi_per_batch else 0
    params["score"]["scale"] = problem.softmax_scale
    params["score"]["softcap"] = problem.modifiers.softcap
    if problem.dropout is not None:
        params["dropout"]["threshold"] = problem.dropout.threshold
        params["dropout"]["scale"] = problem.dropout.scale
    if plan.pass_ == "backward":
        params["padded_seqlen_q"] = plan.padded_seqlen_q
        params["padded_seqlen_k"] = plan.padded_seqlen_k
        params["num_tiles"] = plan.key_tiles
    return struct.tobytes()


class Launch:
    """The kernels of one plan, loaded on one device; launch them as often as you like, from any thread.

    Making one compiles and loads what is missing. A call only packs bytes and launches, so it may be captured in a
    CUDA graph.
    """

    def __init__(self, plan: Plan, device_index: int) -> None:
        cuda = require_cupy().cuda
        self._context = cuda.driver.ctxGetCurrent
        self._bind_context = cuda.runtime.setDevice
        self._launch_kernel = cuda.driver.launchKernel
        self._device_index = device_index
        self.constants = constants(plan)
        self.offsets = _Offsets(PARAMS[plan.main_entry])
        parts = [self.offsets.part_of(step.spec.entry) for step in plan.steps]
        self.through_maps = [
            _Operand(name, part.offset + part.params.fields[name][1], rows)
            for step, part in zip(plan.steps, parts, strict=True)
            for name, rows in step.boxes
        ]
        persistent = any(step.spec.entry in PERSISTENT for step in plan.steps)
        self.counters = tile_counters(device_index) if persistent else None
        self.workspace = _workspace_offsets(plan)
        self._free: list[_Parameters] = []
        self._kernels = [module.load(step.spec, device_index) for step in plan.steps]
        self._launches = []
        for step, kernel, part in zip(plan.steps, self._kernels, parts, strict=True):
            if step.shared_bytes:
                attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                cuda.driver.funcSetAttribute(kernel.handle, attribute, step.shared_bytes)
            launch = (kernel.handle, step.grid, 1, 1, step.threads, 1, 1, step.shared_bytes)
            self._launches.append((launch, self.offsets.parts.index(part)))
        self.workspace_floats = _workspace_floats(plan)

    def bind(self, views: Mapping[str, View]) -> BoundLaunch:
        """Return the launches for arrays of these names, shapes and strides; addresses come with every call."""
        return BoundLaunch(self, views)

    def enqueue(self, pack_into: Callable[..., None], values: list[bytes | int], stream: int) -> None:
        """Launch with the struct that ``pack_into`` writes."""
        try:
            parameters = self._free.pop()
        except IndexError:
            parameters = _Parameters(len(self.constants), self.offsets.parts)
        pack_into(parameters.bytes, 0, *values)
        # A thread that has not used the CUDA runtime yet has no context, and the driver launches nothing without one.
        if not self._context():
            self._bind_context(self._device_index)
        for launch, part in self._launches:
            self._launch_kernel(*launch, stream, parameters.arguments[part], 0)
        self._free.append(parameters)


class BoundLaunch:
    """The launches of a plan for one layout of its arrays.

    The parameters are packed at once, addresses between constants: a write for each would cost more than the launch.
    """

    def __init__(self, launch: Launch, views: Mapping[str, View]) -> None:
        offsets, content = launch.offsets, bytearray(launch.constants)
        for name, offset in offsets.rows:
            _put_strides(content, offset + ROWS.fields["batch_stride"][1], *views[name].strides[:3])
        pointers = [(name, offset) for name, offset in (*offsets.rows, *offsets.pointers) if name in views]
        workspace = [(offsets.of[name], byte_offset) for name, byte_offset in launch.workspace]
        counter = None if launch.counters is None else offsets.of["tile_counter"]
        seed = offsets.of["dropout"]  # seed_low and seed_high are the halves of a little-endian 64-bit seed
        holes = {seed: "Q", seed + DROPOUT_KEY.fields["offset"][1]: "I"}
        holes |= {operand.offset: f"{tensor_map.BYTES}s" for operand in launch.through_maps}
        addresses = [*(offset for _, offset in pointers), *(offset for offset, _ in workspace)]
        holes |= dict.fromkeys(addresses if counter is None else [*addresses, counter], "Q")
        packing = _Packing(bytes(content), holes)
        place_of = packing.places
        self._pack_into, self._values = packing.pack_into, packing.values
        self._pointers = [(place_of[offset], name) for name, offset in pointers]
        self._maps = [
            (place_of[operand.offset], operand.name, operand.maps_like(views[operand.name]))
            for operand in launch.through_maps
        ]
        self._workspace = [(place_of[offset], byte_offset) for offset, byte_offset in workspace]
        self._counters, self._counter = launch.counters, place_of.get(counter)
        self._seed = place_of[seed]
        self._enqueue = launch.enqueue
        self.workspace_floats = launch.workspace_floats

    def __call__(self, pointers: Mapping[str, int], workspace: int, dropout: Dropout | None, stream: int) -> None:
        """Launch on ``stream`` (a ``cudaStream_t``); the device is current.

        ``pointers`` are the addresses of the arrays, ``workspace`` that of ``workspace_floats`` float32 values.
        """
        values = self._values.copy()
        for place, name in self._pointers:
            values[place] = pointers[name]
        for place, name, maps in self._maps:
            values[place] = maps[pointers[name]]
        for place, byte_offset in self._workspace:
            values[place] = workspace + byte_offset
        if self._counters is not None:
            values[self._counter] = self._counters.address(stream)
        if dropout is not None:
            values[self._seed], values[self._seed + 1] = dropout.seed, dropout.offset
        self._enqueue(self._pack_into, values, stream)


class _Packing:
    """How to write a struct that is constant but for ``holes``, which are codes of `struct` by offset.

    ``values`` are the arguments of ``pack_into`` with zeros in the holes, ``places`` the index of each hole in them.
    """

    def __init__(self, content: bytes, holes: Mapping[int, str]) -> None:
        codes, end = "<", 0
        self.values: list[bytes | int] = []
        self.places: dict[int, int] = {}
        for offset, code in sorted(holes.items()):
            if offset > end:
                codes += f"{offset - end}s"
                self.values.append(content[end:offset])
            codes += code
            self.places[offset] = len(self.values)
            self.values.append(0)
            end = offset + struct.calcsize(f"<{code}")
        self.values.append(content[end:])
        self.pack_into = struct.Struct(f"{codes}{len(content) - end}s").pack_into


@dataclass(frozen=True, slots=True)
class _Part:
    """A struct inside of a plan's parameter struct, the whole one first."""

    params: np.dtype
    offset: int


class _Parameters:
    """The bytes of one parameter struct at a fixed address. A call owns one: a launch releases the interpreter lock.

    ``arguments`` are the kernelParams of cuLaunchKernel by part of the struct: each a pointer to a pointer to the one
    argument, the part.
    """

    __slots__ = ("_pinned", "_pointers", "arguments", "bytes")

    def __init__(self, size: int, parts: list[_Part]) -> None:
        self.bytes = bytearray(size)
        self._pinned = (ctypes.c_char * size).from_buffer(self.bytes)
        start = ctypes.addressof(self._pinned)
        self._pointers = (ctypes.c_void_p * len(parts))(*(start + part.offset for part in parts))
        first = ctypes.addressof(self._pointers)
        self.arguments = [first + index * ctypes.sizeof(ctypes.c_void_p) for index in range(len(parts))]


class _Operand:
    """An operand that a kernel finds through tensor maps, at ``offset`` in the struct; they move ``rows`` rows a time.

    Where we allocate, strides are those of the caller's layout, which a plan does not know.
    """

    def __init__(self, name: str, offset: int, rows: int) -> None:
        self.name, self.offset, self._rows = name, offset, rows
        self._maps: dict[tuple[int, ...], _Maps] = {}

    def maps_like(self, view: View) -> _Maps:
        """Return the maps of all arrays with a view's strides."""
        maps = self._maps.get(view.strides)
        if maps is None:
            maps = self._maps[view.strides] = _Maps(tensor_map.Encoder(view, self._rows))
        return maps


class _Maps(dict[int, bytes]):
    """Encoded tensor maps by address, made when they are first asked for."""

    def __init__(self, encoder: tensor_map.Encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def __missing__(self, pointer: int) -> bytes:
        if len(self) >= MAX_MAPS:
            self.clear()
        encoded = self[pointer] = self._encoder.encode(pointer)
        return encoded


class _Offsets:
    """Where operands go in a parameter struct: ``rows`` with strides, ``pointers`` alone; ``parts`` has the maps.

    The fields of the innermost part, which every kernel of the pass takes, count as the struct's own.
    """

    def __init__(self, params: np.dtype) -> None:
        self.parts = [_Part(params, 0)]
        while inner := [name for name in params.names if name in INNER_STRUCTS]:
            params, offset = params.fields[inner[0]][:2]
            self.parts.append(_Part(params, self.parts[-1].offset + offset))
        start = self.parts[-1].offset
        fields = {name: (params.fields[name][0], start + params.fields[name][1]) for name in params.names}
        self.of = {name: offset for name, (_, offset) in fields.items()}
        self.rows = [(name, offset) for name, (dtype, offset) in fields.items() if dtype == ROWS]
        self.pointers = [(name, offset) for name, (dtype, offset) in fields.items() if dtype == POINTER]
        for name, (outer, inner) in OPERANDS_IN_STRUCTS.items():
            self.pointers.append((name, self.of[outer] + fields[outer][0].fields[inner][1]))

    def part_of(self, entry: str) -> _Part:
        """What a kernel takes: the struct that is its own, or the innermost."""
        return next((part for part in self.parts if part.params == PARAMS.get(entry)), self.parts[-1])


WORKSPACE_ALIGNMENT = 64  # floats: 256 bytes, as of an allocation of its own


def _padded_floats(shape: tuple[int, ...]) -> int:
    return -(-int(np.prod(shape, dtype=np.int64)) // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


def _workspace_offsets(plan: Plan) -> list[tuple[str, int]]:
    """Byte offsets of the parts of the workspace in one allocation; every part has 4-byte items."""
    offsets, floats = [], 0
    for name, (shape, _) in plan.workspace.items():
        offsets.append((name, 4 * floats))
        floats += _padded_floats(shape)
    return offsets


def _workspace_floats(plan: Plan) -> int:
    return sum(_padded_floats(shape) for shape, _ in plan.workspace.values())
