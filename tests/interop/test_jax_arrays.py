"""Eager JAX arrays: the same answers as NumPy's; traced ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'cuflash[jax]'")
jnp = jax.numpy


def operands(dtype: str) -> list[jax.Array]:
    """q, k, v and dout."""
    shapes = (2, 33, 4, 16), (2, 41, 2, 16), (2, 41, 2, 24), (2, 33, 4, 24)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_same_answers_as_numpy(dtype):
    device = jax.devices("cpu")[0]
    q, k, v, dout = (jax.device_put(array, device) for array in operands(dtype))
    (out, lse), pullback = cuflash.vjp(q, k, v, causal=True, return_lse=True)
    host = [np.asarray(array) for array in (q, k, v)]
    (expected, expected_lse), host_pullback = cuflash.vjp(*host, causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and out.dtype == q.dtype and out.device == device
    np.testing.assert_array_equal(np.asarray(out), expected)
    np.testing.assert_array_equal(np.asarray(lse), expected_lse)
    for actual, wanted in zip(pullback(dout)[:3], host_pullback(np.asarray(dout))[:3], strict=True):
        assert isinstance(actual, jax.Array)
        np.testing.assert_array_equal(np.asarray(actual), wanted)


def test_heads_before_rows():
    q, k, v, _ = operands("float32")
    by_heads = [array.swapaxes(1, 2) for array in (q, k, v)]
    np.testing.assert_array_equal(
        cuflash.attention(*by_heads, layout="bhsd"), cuflash.attention(q, k, v).swapaxes(1, 2)
    )


def test_arrays_are_never_written():
    q, k, v, _ = operands("float32")
    with pytest.raises(ValueError, match="^out is read-only; it must be writable$"):
        cuflash.attention(q, k, v[..., :16], out=q)


def test_tracing_is_refused():
    q, k, v, _ = operands("float32")
    with pytest.raises(NotImplementedError, match="^q is traced by JAX; .*outside jit, and vjp for gradients"):
        jax.jit(cuflash.attention)(q, k, v)
    with pytest.raises(NotImplementedError, match="^k is traced by JAX; "):
        jax.grad(lambda k: cuflash.attention(q, k, v).sum())(k)
    with pytest.raises(NotImplementedError, match="^v is traced by JAX; "):
        jax.vmap(lambda v: cuflash.attention(q, k, v))(v[None])


def test_kinds_may_not_be_mixed():
    q, k, v, _ = operands("float32")
    with pytest.raises(TypeError, match="^k is a numpy.ndarray; it must be q's kind, jax"):
        cuflash.attention(q, np.asarray(k), v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu(dtype):
    import cupy

    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this JAX has no CUDA")
    q, k, v, dout = operands(dtype)
    (out, lse), pullback = cuflash.vjp(q, k, v, causal=True, return_lse=True)
    shared = [cupy.from_dlpack(array) for array in (q, k, v, dout)]
    (expected, expected_lse), expected_pullback = cuflash.vjp(*shared[:3], causal=True, return_lse=True)
    assert out.device == q.device and out.dtype == q.dtype
    cupy.testing.assert_array_equal(cupy.from_dlpack(out), expected)
    cupy.testing.assert_array_equal(cupy.from_dlpack(lse), expected_lse)
    for actual, wanted in zip(pullback(dout)[1:3], expected_pullback(shared[3])[1:3], strict=True):
        cupy.testing.assert_array_equal(cupy.from_dlpack(actual), wanted)


@pytest.mark.gpu
def test_memory_outlives_the_kernels_that_read_it():
    """Operands dropped right after the call, their memory taken again at once, on a GPU that is still busy."""
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this JAX has no CUDA")
    shape = (4, 4096, 16, 128)
    expected = cuflash.attention(*(jnp.full(shape, 0.5, "bfloat16") for _ in range(3)))
    for _ in range(20):
        out = cuflash.attention(*(jnp.full(shape, 0.5, "bfloat16") for _ in range(3)))
        overwriting = [jnp.full(shape, jnp.nan, "bfloat16") for _ in range(3)]
        assert bool((out == expected).all())
        del overwriting
