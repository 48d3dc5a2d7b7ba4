"""Attention in JAX: cuDNN through ``dot_product_attention``, and FlashAttention-3's kernels as FFI targets."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.providers.base import Bound, Provider, Unavailable, missing_feature
from benchmarks.timing import Clock, DifferenceClock
from benchmarks.workloads import Cell


def load_jax():
    """JAX with a GPU, told before its first use to leave memory for the others."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError as error:
        raise Unavailable("jax is not installed") from error
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        raise Unavailable(f"jax sees no GPU: {error}") from error
    return jax


class JaxProvider(Provider):
    """Compiled functions of JAX arrays; eager dispatch on JAX's own stream, so timed by the host's clock."""

    packages = ("jax", "jaxlib")

    def load(self) -> None:
        load_jax()

    def clock(self) -> Clock:
        return DifferenceClock(load_jax().block_until_ready)

    def bind(self, cell: Cell, arrays: dict) -> Bound:
        import cupy

        jax = load_jax()
        q, k, v, dout = (jax.dlpack.from_dlpack(arrays[name]) for name in ("q", "k", "v", "dout"))
        forward, residuals, backward = self.functions(cell)
        saved: list = []

        def run_backward():
            if not saved:
                saved.append(residuals(q, k, v))
            return backward(saved[0], dout)

        def canonical(array):
            return cupy.from_dlpack(jax.block_until_ready(array))

        return Bound(
            forward=lambda: forward(q, k, v),
            backward=run_backward,
            outputs=lambda results: {"out": canonical(results[0])},
            gradients=lambda grads: dict(zip(("dq", "dk", "dv"), map(canonical, grads), strict=True)),
        )

    def functions(self, cell: Cell) -> tuple[Callable, Callable, Callable]:
        """``forward(q, k, v) -> (out, ...)``, ``residuals(q, k, v)`` and ``backward(residuals, dout) -> (dq, dk, dv)``.

        A compiled function copies each operand that it returns, so the timed forward returns none.
        """
        raise NotImplementedError


class JaxCudnn(JaxProvider):
    """``jax.nn.dot_product_attention`` held to cuDNN."""

    name = "jax_cudnn"

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        if cell.causal and cell.seqlen_q != cell.seqlen_k:
            return "its causal mask is aligned top-left"
        return missing_feature(cell, ())

    def functions(self, cell: Cell) -> tuple[Callable, Callable, Callable]:
        jax = load_jax()
        attention = functools.partial(jax.nn.dot_product_attention, is_causal=cell.causal, implementation="cudnn")

        @jax.jit
        def forward(q, k, v):
            return (attention(q, k, v),)

        @jax.jit
        def residuals(q, k, v):
            return jax.vjp(attention, q, k, v)[1]

        @jax.jit
        def backward(pullback, dout):
            return pullback(dout)

        return forward, residuals, backward


class JaxFlashAttention3(JaxProvider):
    """The FlashAttention-3 kernels of the package dew-flash-attn, called by their FFI names.

    Only their library is loaded: the package itself also loads its FlashAttention-2 build, 338 MB that a Hopper board
    does not use.
    """

    name = "fa3_jax"
    packages = ("jax", "jaxlib", "dew-flash-attn-cu13")
    LIBRARY = "libdew_flash_attn3.so"
    TARGETS = {"fwd": "dew_flash3_mha_fwd", "bwd": "dew_flash3_mha_bwd"}

    def load(self) -> None:
        jax = load_jax()
        capability = jax.devices("gpu")[0].compute_capability
        if capability != "9.0":
            raise Unavailable(f"is built for compute capability 9.0, this GPU has {capability}")
        self._register()

    @classmethod
    @functools.cache
    def _register(cls) -> None:
        jax = load_jax()
        spec = importlib.util.find_spec("dew_flash_attn")
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
        paths = [folder / cls.LIBRARY for folder in folders if (folder / cls.LIBRARY).exists()]
        if not paths:
            raise Unavailable(f"{cls.LIBRARY} of dew-flash-attn is not installed")
        try:
            library = ctypes.CDLL(str(paths[0]))  # libcudart is in the process: jax loaded it
        except OSError as error:
            raise Unavailable(str(error)) from error
        for target in cls.TARGETS.values():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="CUDA")

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        if cell.head_dim != cell.head_dim_v or cell.head_dim % 8:
            return "takes equal head dims that are multiples of 8"
        return missing_feature(cell, (), window=True)

    def functions(self, cell: Cell) -> tuple[Callable, Callable, Callable]:
        jax = load_jax()
        attributes = {
            "softmax_scale": np.float64(cell.softmax_scale),
            "is_causal": cell.causal and cell.window_left is None,
            "window_size_left": np.int64(-1 if cell.window_left is None else cell.window_left),
            "window_size_right": np.int64(-1 if cell.window_left is None else 0),
        }
        float32 = jax.numpy.float32
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
        # The forward's split results are unused without splits; the backward's row values are padded to row blocks of
        # at most 128 in each sequence.
        splits = jax.ShapeDtypeStruct((1, 1, 1, 1), float32), jax.ShapeDtypeStruct((1, 1, 1), float32)
        rows = jax.ShapeDtypeStruct((cell.num_heads * (cell.batch * (cell.seqlen_q + 128) + 128),), float32)

        @jax.jit
        def forward(q, k, v):
            lse = jax.ShapeDtypeStruct((cell.batch, cell.num_heads, cell.seqlen_q), float32)
            call = jax.ffi.ffi_call(self.TARGETS["fwd"], (like(q), lse, *splits))
            return call(q, k, v, **attributes)[:2]

        def residuals(q, k, v):
            return q, k, v, *forward(q, k, v)

        @jax.jit
        def backward(residuals, dout):
            q, k, v, out, lse = residuals
            call = jax.ffi.ffi_call(self.TARGETS["bwd"], (like(q), like(k), like(v), rows, rows))
            return call(dout, q, k, v, out, lse, **attributes)[:3]

        return forward, residuals, backward


PROVIDERS: tuple[Provider, ...] = (JaxCudnn(), JaxFlashAttention3())
