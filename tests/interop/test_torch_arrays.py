"""PyTorch tensors: the same answers as NumPy's, without a copy on the way in or out, and no gradient lost silently."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash.arrays import TorchAdapter, the

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'cuflash[torch]'")

HOST = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def tensors(dtype: str = "float32", device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k, v and dout."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 33, 4, 16), (2, 41, 2, 16), (2, 41, 2, 24), (2, 33, 4, 24)
    return tuple(torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(HOST[str(tensor.dtype).removeprefix("torch.")])


@pytest.mark.parametrize("dtype", HOST)
def test_the_same_answers_as_numpy(dtype):
    q, k, v, dout = tensors(dtype)
    sinks = torch.randn(4)
    (out, lse), pullback = cuflash.vjp(q, k, v, causal=True, sinks=sinks, return_lse=True)
    gradients = pullback(dout)
    host = [to_numpy(tensor) for tensor in (q, k, v)]
    (expected, expected_lse), host_pullback = cuflash.vjp(*host, causal=True, sinks=sinks.numpy(), return_lse=True)
    assert type(out) is torch.Tensor and out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    np.testing.assert_array_equal(to_numpy(out), expected)
    np.testing.assert_array_equal(to_numpy(lse), expected_lse)
    for actual, wanted in zip(gradients[:4], host_pullback(to_numpy(dout))[:4], strict=True):
        np.testing.assert_array_equal(to_numpy(actual), wanted)


def test_transposed_tensors_and_given_results():
    q, k, v, _ = tensors("bfloat16")
    expected = cuflash.attention(q, k, v)
    by_heads = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    out = torch.full((2, 4, 33, 24), torch.nan, dtype=torch.bfloat16)
    assert cuflash.attention(*by_heads, layout="bhsd", out=out, copy=False) is out
    assert torch.equal(out, expected.transpose(1, 2))


def test_in_place():
    q, k, v, _ = tensors("bfloat16")
    expected = cuflash.attention(q, k, v[..., :16])
    assert cuflash.attention(q, k, v[..., :16], out=q) is q
    assert torch.equal(q, expected)


def test_no_gradient_is_lost_silently():
    q, k, v, dout = tensors()
    expected = cuflash.vjp(q, k, v)[1](dout)
    for name, needs_grad in (("q", q), ("k", k), ("v", v)):
        needs_grad.requires_grad_()
        with pytest.raises(NotImplementedError, match=f"^{name} requires grad, .*; use cuflash.vjp$"):
            cuflash.attention(q, k, v)
        with torch.no_grad():
            assert not cuflash.attention(q, k, v).requires_grad
        gradients = cuflash.vjp(q, k, v)[1](dout)
        assert torch.equal(gradients.dq, expected.dq)
        needs_grad.requires_grad_(False)


def test_parameters_are_tensors():
    q, k, v, _ = tensors()
    parameter = torch.nn.Parameter(q, requires_grad=False)
    assert torch.equal(cuflash.attention(parameter, k, v), cuflash.attention(q, k, v))


def test_tensors_that_are_refused():
    class Tagged(torch.Tensor):
        pass

    q, k, v, _ = tensors()
    with pytest.raises(TypeError, match=r"^k is a .*Tagged; attention takes plain torch.Tensor"):
        cuflash.attention(q, k.as_subclass(Tagged), v)
    with pytest.raises(TypeError, match=r"^k is a numpy.ndarray; it must be q's kind, torch.Tensor$"):
        cuflash.attention(q, k.numpy(), v)
    with pytest.raises(TypeError, match=r"^q is a torch.sparse_coo tensor; attention takes strided ones$"):
        cuflash.attention(q.to_sparse(), k, v)
    with pytest.raises(TypeError, match=r"^q is torch.float8_e4m3fn, which NumPy has no equal of$"):
        cuflash.attention(q.to(torch.float8_e4m3fn), k, v)
    with pytest.raises(ValueError, match="^k is on meta; it must be on q's cpu$"):
        cuflash.attention(q, k.to("meta"), v)
    with pytest.raises(TypeError, match="^q is complex64; attention takes"):
        cuflash.attention(q.to(torch.complex64), k, v)


def test_lazily_negated_tensors_are_read_as_they_are():
    q, k, v, _ = tensors()
    negated = torch.complex(torch.zeros_like(q), q).conj().imag
    assert negated.is_neg() and torch.equal(cuflash.attention(negated, k, v), cuflash.attention(-q, k, v))


def test_metadata_is_read_directly():
    q, *_ = tensors("bfloat16")
    adapter = the(TorchAdapter)
    view = adapter.view(q.transpose(1, 2))
    assert (view.pointer, view.shape, view.strides) == (q.data_ptr(), (2, 4, 33, 16), (2112, 16, 64, 1))
    assert (view.dtype, view.device, adapter.pointer(q)) == ("bfloat16", ("cpu", 0), q.data_ptr())
    assert adapter.view(q.float().to_sparse()).dtype == "sparse_coo float32"
    assert adapter.fingerprint(q) == adapter.fingerprint(q[:]) != adapter.fingerprint(q.transpose(0, 1))
    assert adapter.fingerprint(q.to_sparse()) != adapter.fingerprint(q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu(dtype):
    """A tensor and the CuPy array of the same memory go through different adapters to the same kernels."""
    import cupy

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    q, k, v, dout = tensors(dtype, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        (out, lse), pullback = cuflash.vjp(q, k, v, causal=True, return_lse=True)
        gradients = pullback(dout)
    stream.synchronize()
    shared = [cupy.from_dlpack(tensor) for tensor in (q, k, v, dout)]
    (expected, expected_lse), pullback = cuflash.vjp(*shared[:3], causal=True, return_lse=True)
    assert out.device == q.device and out.dtype == q.dtype
    assert torch.equal(out, torch.from_dlpack(expected)) and torch.equal(lse, torch.from_dlpack(expected_lse))
    for actual, wanted in zip(gradients[1:3], pullback(shared[3])[1:3], strict=True):  # the order of sums to dq is free
        assert torch.equal(actual, torch.from_dlpack(wanted))
    given = torch.full_like(out, torch.nan)
    assert cuflash.attention(q, k, v, causal=True, out=given) is given and torch.equal(given, out)
    with pytest.raises(ValueError, match="^k is on cpu; it must be on q's cuda:0$"):
        cuflash.attention(q, k.cpu(), v)
