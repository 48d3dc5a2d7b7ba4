"""From public keywords to a backend: every check once per kind of call, after that only pointers change.

A call is identified by its keywords and by what its arrays tell cheaply about themselves. The first call of a kind
builds and checks a `Problem`; every later one finds it in a dictionary, so that a small problem pays microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cuflash.arrays import Adapter, Array
from cuflash.backends import cuda_backend, numpy_backend
from cuflash.dropout import Dropout
from cuflash.layouts import CANONICAL_AXES, to_canonical
from cuflash.problem import (
    DTYPES,
    Problem,
    View,
    check_backend_dtype,
    check_copy,
    check_copy_keyword,
    check_dropout,
    check_flag,
    check_out,
    check_used_lengths,
    refuse_unlanded,
)

Operands = Mapping[str, Array]  # by argument name

KERNELS = ("sm80", "sm90")
BACKENDS = ("numpy", "cuda", *KERNELS)
MAX_PREPARED = 4096  # kinds of calls remembered; decoding with a growing cache brings a new one every step
WITH_HEAD_DIM = frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv"))  # arrays whose axes the layout names


class Options(NamedTuple):
    """The keywords that checks and plans depend on.

    ``types`` keeps apart what compares equal: ``deterministic=True`` is accepted, ``deterministic=1`` is not.
    """

    causal: bool | str
    window_size: tuple[int | None, int | None] | None
    softmax_scale: float | None
    softcap: float
    dropout_p: float
    deterministic: bool
    layout: str
    copy: bool | None
    backend: str | None
    types: tuple[type, ...]


class Request(NamedTuple):
    """The keywords of one public call, sorted by what they decide."""

    operands: dict[str, Array]
    options: Options
    seed: int | None
    offset: int
    return_lse: bool


class Fields(NamedTuple):
    """A canonical `View` without its pointer, the part that differs between calls of one kind."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int]

    @classmethod
    def of(cls, name: str, view: View, layout: str) -> Fields:
        if name not in WITH_HEAD_DIM:
            return cls(view.shape, view.strides, view.dtype, view.device)
        return cls(to_canonical(view.shape, layout), to_canonical(view.strides, layout), view.dtype, view.device)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all calls of one kind share."""

    problem: Problem
    backend: str
    layout: str
    device_index: int
    copies: tuple[str, ...]  # operands to copy before anything else
    operands: dict[str, Fields]
    results: dict[str, tuple[tuple[int, ...], Fields]]  # the caller's shape, and how a backend sees it
    launches: dict[tuple[str, ...], cuda_backend.BoundLaunch] = field(default_factory=dict)  # by wanted results


def request(
    q: Array,
    k: Array,
    v: Array,
    causal=False,
    window_size=None,
    softmax_scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    score_mod=None,
    mask_mod=None,
    block_mask=None,
    bias=None,
    dropout_p=0.0,
    seed=None,
    offset=0,
    seqused_q=None,
    seqused_k=None,
    deterministic=False,
    return_lse=False,
    layout="bshd",
    out=None,
    copy=None,
    backend=None,
) -> Request:
    """Sort the keywords of `cuflash.attention`, whose names, order and defaults these are."""
    if score_mod is not None or mask_mod is not None or block_mask is not None or bias is not None:
        refuse_unlanded(score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask, bias=bias)
    operands = {"q": q, "k": k, "v": v}
    if alibi_slopes is not None:
        operands["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        operands["sinks"] = sinks
    if seqused_q is not None:
        operands["seqused_q"] = seqused_q
    if seqused_k is not None:
        operands["seqused_k"] = seqused_k
    if out is not None:
        operands["out"] = out
    if type(return_lse) is not bool:
        return_lse = check_flag("return_lse", return_lse)
    types = type(causal), type(softmax_scale), type(softcap), type(dropout_p), type(deterministic), type(copy)
    if isinstance(window_size, (tuple, list)):
        window_size = tuple(window_size)
        types += tuple(map(type, window_size))
    options = Options(
        causal, window_size, softmax_scale, softcap, dropout_p, deterministic, layout, copy, backend, types
    )  # fmt: skip
    return Request(operands, options, seed, offset, return_lse)


def forward(lender: Adapter, call: Request, *, want_lse: bool, keeps_q: bool = False) -> tuple[Array, Array | None]:
    """Run the forward pass; the results are the caller's kind of array, in the caller's layout."""
    adapter, arrays, prepared = prepare(lender, call.operands, call.options)
    dropout = _dropout(prepared.problem, call)
    given = call.operands.get("out")
    if given is not None:
        views = {name: adapter.view(array) for name, array in arrays.items()}
        writable = lender.is_writable(given) and adapter.is_writable(arrays["out"])
        check_out(views, writable=writable, keeps_q=keeps_q)
    if prepared.backend == "numpy":
        results = _forward_on_host(_seeded(prepared.problem, dropout), prepared, arrays)
    else:
        results = _launch("forward", dropout, prepared, lender, arrays, ("out", "lse") if want_lse else ("out",))
    if lender is not adapter:
        results = _give(lender, prepared, results, call.operands["q"])
    return results["out"] if given is None else given, results.get("lse")


def backward(lender: Adapter, call: Request) -> dict[str, Array]:
    """Run the backward pass of a request that also holds dout, out, lse and perhaps dlse; gradients by name."""
    adapter, arrays, prepared = prepare(lender, call.operands, call.options)
    dropout = _dropout(prepared.problem, call)
    if prepared.backend == "numpy":
        results = _backward_on_host(_seeded(prepared.problem, dropout), prepared, arrays)
    else:
        wanted = ("dq", "dk", "dv", "dsinks") if prepared.problem.sinks else ("dq", "dk", "dv")
        results = _launch("backward", dropout, prepared, lender, arrays, wanted)
    return results if lender is adapter else _give(lender, prepared, results, call.operands["q"])


_prepared: dict[tuple, Prepared] = {}  # single reads and writes only, so threads need no lock


def prepare(lender: Adapter, operands: Operands, options: Options) -> tuple[Adapter, Operands, Prepared]:
    """Return the native adapter, the operands as its arrays, copied where they must be, and what is known of them."""
    adapter, arrays = lender.native, operands
    if adapter is not lender:
        arrays = {name: lender.borrow(name, array) for name, array in operands.items()}
    key = (adapter, options, *arrays, *map(adapter.fingerprint, arrays.values()))
    try:
        prepared = _prepared.get(key)
    except TypeError:  # no check accepts a keyword that cannot be hashed: let one of them name it
        prepared = None
    if prepared is None:
        prepared = _prepare(adapter, arrays, options)
        if len(_prepared) >= MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    if prepared.copies:
        try:
            packed = {name: adapter.packed(arrays[name]) for name in prepared.copies}
        finally:
            lender.hold(arrays)  # the passes see the copies only, so nothing later holds the originals
        return prepare(adapter, {**arrays, **packed}, options)
    return adapter, arrays, prepared


def _prepare(adapter: Adapter, arrays: Operands, options: Options) -> Prepared:
    """Check one kind of call."""
    layout = options.layout
    views = {name: adapter.view(array) for name, array in arrays.items()}
    backend = choose_backend(options.backend, views["q"])
    check_copy_keyword(options.copy)
    copies = []
    for name, view in views.items():
        is_result = name == "out" and "dout" not in views  # written in place, so never copied
        if not is_result and check_copy(name, view, options.copy, addressable=adapter.is_addressable(arrays[name])):
            copies.append(name)
            views[name] = View.of(view.shape, view.dtype, view.device)
    problem = Problem.build(
        views,
        causal=options.causal,
        window_size=options.window_size,
        softmax_scale=options.softmax_scale,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        deterministic=options.deterministic,
        layout=layout,
        kernels=backend if backend in KERNELS else None,
    )
    supported = DTYPES if backend == "numpy" else cuda_backend.DTYPES
    check_backend_dtype(problem.dtype, backend, supported)
    results = {}
    for name, (shape, dtype) in _results(problem).items():
        named = to_canonical(shape, layout) if name in WITH_HEAD_DIM else shape
        results[name] = (named, Fields.of(name, View.of(named, dtype, views["q"].device), layout))
    operands = {name: Fields.of(name, view, layout) for name, view in views.items()}
    return Prepared(problem, backend, layout, views["q"].device[1], tuple(copies), operands, results)


def _results(problem: Problem) -> dict[str, tuple[tuple[int, ...], str]]:
    """Canonical shape and dtype of all that either pass returns."""
    return {
        "out": (problem.out_shape, problem.dtype),
        "lse": (problem.lse_shape, problem.accumulator),
        "dq": (problem.q.shape, problem.dtype),
        "dk": (problem.k.shape, problem.dtype),
        "dv": (problem.v.shape, problem.dtype),
        "dsinks": ((problem.num_heads,), problem.accumulator),
    }


def choose_backend(requested: str | None, q: View) -> str:
    """Return the backend for arrays on q's device, or refuse the requested one.

    >>> choose_backend(None, View.of((1, 8, 1, 16), "float16"))
    'numpy'
    """
    on_gpu = q.device[0] == "cuda"
    if requested is None:
        return "cuda" if on_gpu else "numpy"
    if not isinstance(requested, str) or requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}; it must be None or one of {', '.join(map(repr, BACKENDS))}")
    if requested == "numpy" and on_gpu:
        raise ValueError("backend is 'numpy' and q is on a GPU; move the arrays, for instance by cupy.asnumpy")
    if requested != "numpy" and not on_gpu:
        raise ValueError(f"backend is {requested!r} and q is on the cpu; move the arrays, for instance by cupy.asarray")
    return requested


def _dropout(problem: Problem, call: Request) -> Dropout | None:
    """Prepared problems know no seed; every call brings its own."""
    if problem.dropout is None and call.seed is None and type(call.offset) is int and call.offset == 0:
        return None
    return check_dropout(call.options.dropout_p, call.seed, call.offset)


def _seeded(problem: Problem, dropout: Dropout | None) -> Problem:
    return problem if dropout is None else problem.with_seed(dropout.seed, dropout.offset)


def _forward_on_host(problem: Problem, prepared: Prepared, arrays: Operands) -> dict[str, np.ndarray]:
    axes = CANONICAL_AXES[prepared.layout]
    operands = _host_operands(problem, axes, arrays)
    if "out" not in operands:
        operands["out"] = np.empty(prepared.results["out"][0], operands["q"].dtype).transpose(axes)
    out, lse = numpy_backend.forward(problem, **operands)
    return {"out": out.transpose(axes), "lse": lse}


def _backward_on_host(problem: Problem, prepared: Prepared, arrays: Operands) -> dict[str, np.ndarray]:
    axes = CANONICAL_AXES[prepared.layout]
    dq, dk, dv, dsinks = numpy_backend.backward(problem, **_host_operands(problem, axes, arrays))
    results = {"dq": dq.transpose(axes), "dk": dk.transpose(axes), "dv": dv.transpose(axes)}
    return results if dsinks is None else {**results, "dsinks": dsinks}


def _host_operands(problem: Problem, axes: tuple[int, ...], arrays: Operands) -> dict[str, np.ndarray]:
    for name, longest in (("seqused_q", problem.layout.seqlen_q), ("seqused_k", problem.layout.seqlen_k)):
        if name in arrays:
            check_used_lengths(name, arrays[name], longest)
    return {name: array.transpose(axes) if name in WITH_HEAD_DIM else array for name, array in arrays.items()}


def _launch(
    direction: str,
    dropout: Dropout | None,
    prepared: Prepared,
    lender: Adapter,
    arrays: Operands,
    wanted: tuple[str, ...],
) -> dict[str, Array]:
    """Run one pass on the arrays' device and the caller's current stream, its results in new arrays or in ``out``."""
    adapter, index, results = lender.native, prepared.device_index, {}
    pointer = adapter.pointer
    pointers = {name: pointer(array) for name, array in arrays.items()}
    with adapter.on_device(index):
        stream = adapter.stream(index)
        launch = prepared.launches.get(wanted)
        if launch is None:
            launch = prepared.launches[wanted] = _bind(direction, prepared, wanted, stream)
        for name in wanted:
            if name in arrays:
                results[name] = arrays[name]
            else:
                shape, fields = prepared.results[name]
                results[name] = adapter.empty(shape, fields.dtype, index)
                pointers[name] = pointer(results[name])
        floats = launch.workspace_floats
        workspace, memory = adapter.workspace(floats, index) if floats else (0, None)
        try:
            launch(pointers, workspace, dropout, stream)
        finally:
            del memory  # while its device is current: an asynchronous pool frees on that device's stream
            lender.hold(arrays)  # a launch that fails may come after others of the pass, which read on
    return results


def _bind(direction: str, prepared: Prepared, wanted: tuple[str, ...], stream: int) -> cuda_backend.BoundLaunch:
    fields = {name: prepared.results[name][1] for name in wanted} | prepared.operands
    views = {name: View(0, *parts) for name, parts in fields.items()}
    return cuda_backend.bind(direction, prepared.problem, prepared.device_index, views, stream)


def _give(lender: Adapter, prepared: Prepared, results: dict[str, Array], like: Array) -> dict[str, Array]:
    """Return results of the native kind as the caller's kind of array."""
    with lender.native.on_device(prepared.device_index):
        return {name: lender.give(array, like) for name, array in results.items()}
