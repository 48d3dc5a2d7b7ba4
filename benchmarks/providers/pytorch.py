"""PyTorch's scaled_dot_product_attention by backend, FlexAttention, and FlashAttention 3 and 4 on torch tensors."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable

from benchmarks.providers.base import Bound, Provider, Unavailable, missing_feature, reason
from benchmarks.timing import Clock, EventClock
from benchmarks.workloads import Cell

FORWARD_ONLY = {"fa3_fwd_interface"}


class TorchProvider(Provider):
    """A differentiable torch function; its backward alone is ``autograd.grad`` over a kept graph."""

    packages = ("torch", "triton")

    def load(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise Unavailable("torch is not installed") from error
        if not torch.cuda.is_available():
            raise Unavailable("torch sees no GPU")

    def clock(self) -> Clock:
        return EventClock()

    def bind(self, cell: Cell, arrays: dict) -> Bound:
        import cupy
        import torch

        q, k, v = (torch.from_dlpack(arrays[name]).requires_grad_() for name in ("q", "k", "v"))
        dout = torch.from_dlpack(arrays["dout"])
        function = self.function(cell, arrays)
        graph: list = []

        def forward():
            with torch.no_grad():
                return function(q, k, v)

        def backward():
            if not graph:
                graph.append(function(q, k, v))
            return torch.autograd.grad(graph[0], (q, k, v), dout, retain_graph=True)

        def canonical(tensor):
            return cupy.from_dlpack(tensor.detach())

        return Bound(
            forward,
            backward,
            outputs=lambda out: {"out": canonical(out)},
            gradients=lambda grads: dict(zip(("dq", "dk", "dv"), map(canonical, grads), strict=True)),
        )

    def function(self, cell: Cell, arrays: dict) -> Callable:
        """The attention of canonical (batch, seqlen, heads, head_dim) tensors."""
        raise NotImplementedError


class Sdpa(TorchProvider):
    """``scaled_dot_product_attention`` held to one of its backends."""

    def __init__(self, name: str, backend: str, features: tuple[str, ...] = (), longest: int | None = None):
        self.name, self._backend, self._features, self._longest = name, backend, features, longest

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        if cell.causal and cell.seqlen_q != cell.seqlen_k:
            return "its causal mask is aligned top-left"
        if self._longest and cell.seqlen_k > self._longest:
            return f"materialises the scores: not run past {self._longest} keys"
        return missing_feature(cell, self._features)

    def gate_cell(self, cell: Cell) -> Cell:
        return dataclasses.replace(cell, feature="plain") if cell.dropout_p else cell

    def function(self, cell: Cell, arrays: dict) -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        backend = getattr(SDPBackend, self._backend)
        grouped = {"enable_gqa": True} if cell.num_heads != cell.num_kv_heads else {}

        def attention(q, k, v):
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    dropout_p=cell.dropout_p,
                    is_causal=cell.causal,
                    **grouped,
                )
            return out.transpose(1, 2)

        return attention


class Flex(TorchProvider):
    """FlexAttention, compiled afresh for each cell so that no limit on recompilations is met."""

    name = "flex"

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        return missing_feature(cell, ("alibi", "softcap"), window=True)

    def function(self, cell: Cell, arrays: dict) -> Callable:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        offset = cell.seqlen_k - cell.seqlen_q
        slopes = torch.from_dlpack(arrays["alibi_slopes"]) if "alibi_slopes" in arrays else None
        left = cell.window_left

        def visible(batch, head, q_idx, kv_idx):
            seen = q_idx + offset >= kv_idx
            return seen if left is None else seen & (q_idx + offset - kv_idx <= left)

        def alibi(score, batch, head, q_idx, kv_idx):
            return score - slopes[head] * (q_idx + offset - kv_idx).abs()

        def softcap(score, batch, head, q_idx, kv_idx):
            return cell.softcap * torch.tanh(score / cell.softcap)

        score_mod = softcap if cell.softcap else alibi if slopes is not None else None
        block_mask = None
        if cell.causal:
            block_mask = create_block_mask(visible, None, None, cell.seqlen_q, cell.seqlen_k, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = cell.num_heads != cell.num_kv_heads

        def attention(q, k, v):
            out = compiled(
                *(x.transpose(1, 2) for x in (q, k, v)), score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped
            )
            return out.transpose(1, 2)

        return attention


class FlashAttention(TorchProvider):
    """FlashAttention 3 or 4: a package whose ``flash_attn_func`` takes canonical tensors."""

    def __init__(self, name: str, modules: tuple[str, ...], features: tuple[str, ...], packages: tuple[str, ...]):
        self.name, self._modules, self._features = name, modules, features
        self.packages = ("torch", *packages)

    def load(self) -> None:
        super().load()
        self._library()

    def _library(self):
        reasons = []
        for name in self._modules:
            try:
                return importlib.import_module(name)
            except Exception as error:  # not installed, or a build that does not fit: the other libraries go on
                reasons.append(f"{name}: {reason(error)}")
        raise Unavailable("; ".join(reasons))

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        if pass_ == "bwd" and FORWARD_ONLY & sys.modules.keys() & set(self._modules):
            return "is a build without a backward"
        return missing_feature(cell, self._features, window=True)

    def function(self, cell: Cell, arrays: dict) -> Callable:
        import torch

        function = self._library().flash_attn_func
        keywords: dict[str, object] = {"causal": cell.causal and cell.window_left is None}
        if cell.window_left is not None:
            keywords["window_size"] = (cell.window_left, 0)
        if cell.softcap:
            keywords["softcap"] = cell.softcap
        if cell.deterministic:
            keywords["deterministic"] = True
        if "sinks" in arrays:
            keywords["learnable_sink"] = torch.from_dlpack(arrays["sinks"]).to(torch.bfloat16)

        def attention(q, k, v):
            result = function(q, k, v, **keywords)
            return result[0] if isinstance(result, tuple) else result

        return attention


PROVIDERS: tuple[Provider, ...] = (
    Sdpa("torch_flash", "FLASH_ATTENTION", features=("dropout",)),
    Sdpa("torch_cudnn", "CUDNN_ATTENTION", features=("dropout",)),
    Sdpa("torch_efficient", "EFFICIENT_ATTENTION", features=("dropout",)),
    Sdpa("torch_math", "MATH", longest=4096),
    FlashAttention(
        "fa3",
        ("flash_attn_interface", "fa3_fwd_interface"),
        features=("softcap", "deterministic"),
        packages=("flash-attn-3", "fa3-fwd"),
    ),
    FlashAttention(
        "fa4",
        ("flash_attn.cute",),
        features=("softcap", "sinks", "deterministic"),
        packages=("flash-attn-4", "nvidia-cutlass-dsl"),
    ),
    Flex(),
)
