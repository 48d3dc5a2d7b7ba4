"""One attention call as a value: shapes, dtypes, mask, modifiers, dropout. Every user error is raised here.

``Problem.build`` takes descriptions of the caller's arrays (``View``) and the public keywords, checks them all and
returns a frozen, hashable value that no longer knows about memory. Nothing here imports an array library's arrays, so
a problem can be built, printed and planned on a machine without a GPU.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cuflash.dropout import Dropout
from cuflash.layouts import CANONICAL_AXES, Dense, to_canonical
from cuflash.masks import Mask
from cuflash.modifiers import Modifiers

MAX_HEAD_DIM = 256
MAX_LENGTH = 1 << 30  # of an axis or a window: kernels add two of them in 32 bits
MAX_DROPOUT_AXIS = 1 << 16  # the dropout counter packs batch and head into one 32-bit word
WIDEST_LOAD = 16  # bytes
FLOAT32_TINY, FLOAT32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}
DTYPES = ("float16", "bfloat16", "float32", "float64")
NEAREST = {
    "score_mod": "softcap and alibi_slopes",
    "mask_mod": "causal, window_size, seqused_q and seqused_k",
    "block_mask": "causal and window_size",
    "bias": "alibi_slopes and sinks",
}
AXES = {"bshd": "(batch, seqlen, heads, head_dim)", "bhsd": "(batch, heads, seqlen, head_dim)"}


@dataclass(slots=True)
class View:
    """Where an array lies in memory, whatever library made it.

    ``strides`` count elements; ``device`` is ``("cpu", 0)`` or ``("cuda", index)``. Not frozen: one is made per
    array and call, and freezing would double its cost.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int] = ("cpu", 0)

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, device: tuple[str, int] = ("cpu", 0)) -> View:
        """Describe a contiguous, aligned array that need not exist.

        >>> View.of((2, 3, 4), "float16").strides
        (12, 4, 1)
        """
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(0, tuple(shape), strides, dtype, device)

    @property
    def is_row_contiguous(self) -> bool:
        """Whether neighbours on the last axis are neighbours in memory; always so where no two of them exist."""
        return not self.shape or self.shape[-1] <= 1 or self.strides[-1] == 1 or 0 in self.shape

    @property
    def is_contiguous(self) -> bool:
        packed = View.of(self.shape, self.dtype).strides
        return 0 in self.shape or all(
            size == 1 or stride == dense for size, stride, dense in zip(self.shape, self.strides, packed, strict=True)
        )


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape and strides of one operand in canonical (batch, seqlen, heads, head_dim) order.

    ``strides`` count elements. ``alignment`` is the largest power of two, at most 16, that divides the
    address and every stride in bytes: the widest load that the array allows.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    alignment: int = WIDEST_LOAD

    @classmethod
    def of(cls, view: View, layout: str = "bshd") -> ArraySpec:
        """Describe a view whose axes are named by ``layout``.

        >>> ArraySpec.of(View.of((1, 8, 100, 60), "float16"), "bhsd")
        ArraySpec(shape=(1, 100, 8, 60), strides=(48000, 60, 6000, 1), alignment=8)
        """
        itemsize = ITEMSIZE[view.dtype]
        # An axis of one element is never stepped along, so its stride says nothing about alignment.
        steps = (stride * itemsize for size, stride in zip(view.shape[:-1], view.strides[:-1], strict=True) if size > 1)
        return cls(
            to_canonical(view.shape, layout),
            to_canonical(view.strides, layout),
            math.gcd(WIDEST_LOAD, view.pointer, *steps),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """A checked attention problem; hashable, free of pointers, printable.

    ``out`` and ``dout`` describe arrays that the caller brings to a forward (``out=``) or a backward; None stands for
    an array that the library allocates, contiguous and aligned. ``kernels`` is the family that the caller insists on,
    ``"sm80"`` or ``"sm90"``; None leaves the choice to the plan.
    """

    layout: Dense
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    softmax_scale: float
    mask: Mask
    modifiers: Modifiers
    sinks: bool
    dropout: Dropout | None
    deterministic: bool
    q: ArraySpec
    k: ArraySpec
    v: ArraySpec
    out: ArraySpec | None = None
    dout: ArraySpec | None = None
    kernels: str | None = None

    @classmethod
    def build(
        cls,
        views: Mapping[str, View],
        *,
        causal: bool | str = False,
        window_size: tuple[int | None, int | None] | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        seed: int | None = 0,
        offset: int = 0,
        deterministic: bool = False,
        layout: str = "bshd",
        kernels: str | None = None,
    ) -> Problem:
        """Check one call and describe it.

        Parameters
        ----------
        views : mapping of str to View
            The caller's arrays by argument name: ``q``, ``k``, ``v``, and those of ``alibi_slopes``, ``sinks``,
            ``seqused_q``, ``seqused_k``, ``out``, ``dout``, ``lse``, ``dlse`` that are given. Axes as ``layout`` says.
        causal, window_size, softmax_scale, softcap, dropout_p, seed, offset, deterministic, layout
            As in `cuflash.attention`.
        kernels : {None, "sm80", "sm90"}
            The family of GPU kernels that the caller insists on.

        Examples
        --------
        >>> shape = (2, 100, 8, 64)
        >>> views = {"q": View.of(shape, "float16"), "k": View.of(shape, "float16"), "v": View.of(shape, "float16")}
        >>> problem = Problem.build(views, causal=True)
        >>> problem.softmax_scale, problem.mask
        (0.125, Mask(left=None, right=0, top_left=False))
        >>> Problem.build(views | {"k": View.of((2, 100, 6, 64), "float16")})
        Traceback (most recent call last):
        ...
        ValueError: k has 6 heads; q's 8 heads need a divisor of 8
        """
        check_layout(layout)
        check_mask(causal, window_size)
        dtype = _check_dtypes(views)
        _check_devices(views)
        q, k, v = _check_shapes(views, layout)
        batch, seqlen_q, num_heads, head_dim = q.shape
        _, seqlen_k, num_kv_heads, head_dim_v = v.shape
        _check_per_head(views, batch, num_heads)
        _check_used_lengths(views, batch)
        _check_results(views, layout, (batch, seqlen_q, num_heads, head_dim_v))
        for name, view in views.items():
            _check_strides(name, view)
        dropout = check_dropout(dropout_p, seed, offset)
        if dropout is not None and max(batch, num_heads) >= MAX_DROPOUT_AXIS:
            raise ValueError(f"q has batch {batch} and {num_heads} heads; dropout needs both below {MAX_DROPOUT_AXIS}")
        return cls(
            layout=Dense(batch, seqlen_q, seqlen_k, "seqused_q" in views, "seqused_k" in views),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            softmax_scale=check_softmax_scale(softmax_scale, head_dim),
            mask=Mask.resolve(causal, window_size),
            modifiers=Modifiers(
                check_softcap(softcap),
                alibi="alibi_slopes" in views,
                alibi_per_batch="alibi_slopes" in views and len(views["alibi_slopes"].shape) == 2,
            ),
            sinks="sinks" in views,
            dropout=dropout,
            deterministic=check_flag("deterministic", deterministic),
            q=q,
            k=k,
            v=v,
            out=ArraySpec.of(views["out"], layout) if "out" in views else None,
            dout=ArraySpec.of(views["dout"], layout) if "dout" in views else None,
            kernels=kernels,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (*self.q.shape[:3], self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        return (self.layout.batch, self.num_heads, self.layout.seqlen_q)

    @property
    def accumulator(self) -> str:
        """Dtype of the softmax and of lse: float64 for float64 arrays, float32 for all others."""
        return "float64" if self.dtype == "float64" else "float32"

    def with_seed(self, seed: int, offset: int) -> Problem:
        """Return the same problem with other random numbers."""
        return replace(self, dropout=replace(self.dropout, seed=seed, offset=offset))

    def without_seed(self) -> Problem:
        """Return what plans and kernels depend on: the same problem whatever its seed and offset are.

        Every training step brings a new seed, so a plan that were kept per seed would be made anew each time.
        """
        if self.dropout is None or (self.dropout.seed == 0 and self.dropout.offset == 0):
            return self
        return replace(self, dropout=Dropout(self.dropout.p, seed=0))


def check_layout(layout: str) -> None:
    if not isinstance(layout, str) or layout not in CANONICAL_AXES:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(map(repr, CANONICAL_AXES))}")


def check_mask(causal: bool | str, window_size: tuple[int | None, int | None] | None) -> None:
    is_flag = isinstance(causal, (numbers.Integral, np.bool_)) and causal in (0, 1)
    if not is_flag and not (isinstance(causal, str) and causal == "top_left"):
        raise ValueError(f"causal is {causal!r}; it must be False, True or 'top_left'")
    if window_size is None:
        return
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size is {window_size!r}; it must be None or a pair (left, right)")
    for side in window_size:
        if side is None:
            continue
        if not isinstance(side, numbers.Integral):
            raise TypeError(f"window_size is {window_size!r}; each side must be None or a whole number")
        if not -1 <= side < MAX_LENGTH:
            raise ValueError(f"window_size is {window_size!r}; each side must be None, -1 or from 0 to 2**30 - 1")


def check_softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    scale = _check_real("softmax_scale", softmax_scale)
    if not abs(scale) <= FLOAT32_MAX:
        raise ValueError(f"softmax_scale is {softmax_scale!r}; it must be a finite float32 number")
    return scale


def check_softcap(softcap: float) -> float:
    cap = _check_real("softcap", softcap)
    if cap != 0 and not FLOAT32_TINY <= cap <= FLOAT32_MAX:
        raise ValueError(f"softcap is {softcap!r}; it must be 0 (off) or a positive, finite, normal float32 number")
    return cap


def check_dropout(dropout_p: float, seed: int | None, offset: int) -> Dropout | None:
    """Check the dropout keywords; None where nothing is dropped."""
    p = _check_real("dropout_p", dropout_p)
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p is {dropout_p!r}; it must lie in [0, 1)")
    for name, value, bits in (("seed", seed, 64), ("offset", offset, 32)):
        if name == "seed" and value is None:
            continue
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} is {value!r}; it must be a whole number")
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2**{bits})")
    if p == 0:
        return None
    if seed is None:
        raise ValueError(f"seed is None; dropout_p={dropout_p} needs the seed of the forward")
    return Dropout(p, int(seed), int(offset))


def check_backend_dtype(dtype: str, backend: str, supported: tuple[str, ...]) -> None:
    if dtype not in supported:
        raise TypeError(f"q is {dtype}; the {backend} backend takes {' or '.join(supported)}")


def check_used_lengths(name: str, lengths: np.ndarray, longest: int) -> None:
    """Check values that the host can read; on a GPU reading them would stop the stream."""
    for length in lengths:
        if not 0 <= length <= longest:
            raise ValueError(f"{name} has {length}; it must lie between 0 and the allocated {longest}")


def check_out(views: Mapping[str, View], *, writable: bool, keeps_q: bool = False) -> None:
    """Check that writing ``out`` changes nothing that is still to be read; ``keeps_q`` forbids ``out=q`` too."""
    out = views["out"]
    if not writable:
        raise ValueError("out is read-only; it must be writable")
    if _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides} for shape {out.shape}; no two elements may share memory")
    rule = "vjp reads it again" if keeps_q else "only out=q itself, with head_dim_v equal to head_dim, works in place"
    for name, view in views.items():
        is_q = name == "q" and (view.pointer, view.shape, view.strides) == (out.pointer, out.shape, out.strides)
        if name != "out" and (keeps_q or not is_q) and _overlap(out, view):
            raise ValueError(f"out overlaps {name}; {rule}")


def refuse_unlanded(**keywords: object) -> None:
    """Name the nearest choice for keywords whose feature does not exist yet."""
    for name, value in keywords.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported yet; nearest are {NEAREST[name]}")


def check_copy(name: str, view: View, copy: bool | None, *, addressable: bool = True) -> bool:
    """Whether an operand must be copied before a backend can read it; an error where the caller refused that."""
    if addressable and (view.is_contiguous if name in PACKED else view.is_row_contiguous):
        return False
    if copy is not None:
        part = "all of it" if name in PACKED else "its last axis"
        rule = f"{part} must be contiguous and aligned where copy=False refuses a copy"
        raise ValueError(f"{name} has strides {view.strides}; {rule}")
    return True


def check_copy_keyword(copy: bool | None) -> None:
    if copy is not None and copy is not False:
        raise ValueError(f"copy is {copy!r}; it must be None (copy where a backend needs it) or False (never)")


# Operands of one value per head, row or sequence: kernels index them without strides.
PACKED = ("alibi_slopes", "sinks", "seqused_q", "seqused_k", "lse", "dlse")


def _check_real(name: str, value: float) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a real number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value!r}; it must be finite") from None


def check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def _check_dtypes(views: Mapping[str, View]) -> str:
    dtype = views["q"].dtype
    if dtype not in DTYPES:
        raise TypeError(f"q is {dtype}; attention takes {', '.join(DTYPES)}")
    accumulator = "float64" if dtype == "float64" else "float32"
    expected = {"alibi_slopes": "float32", "sinks": "float32", "seqused_q": "int32", "seqused_k": "int32"}
    expected |= {"lse": accumulator, "dlse": accumulator}
    for name, view in views.items():
        if name in expected and view.dtype != expected[name]:
            raise TypeError(f"{name} is {view.dtype}; it must be {expected[name]}")
        if name not in expected and view.dtype != dtype:
            raise TypeError(f"{name} is {view.dtype}; it must have q's dtype, {dtype}")
    return dtype


def _check_devices(views: Mapping[str, View]) -> None:
    device = views["q"].device
    for name, view in views.items():
        if view.device != device:
            raise ValueError(f"{name} is on {_device_name(view.device)}; it must be on q's {_device_name(device)}")


def _device_name(device: tuple[str, int]) -> str:
    return device[0] if device[0] == "cpu" else f"{device[0]}:{device[1]}"


def _check_shapes(views: Mapping[str, View], layout: str) -> tuple[ArraySpec, ArraySpec, ArraySpec]:
    for name in ("q", "k", "v"):
        shape = views[name].shape
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {shape}; it must have four axes, {AXES[layout]}")
        if max(shape) >= MAX_LENGTH:
            raise ValueError(f"{name} has shape {shape}; every axis must be shorter than 2**30")
    q, k, v = (ArraySpec.of(views[name], layout) for name in ("q", "k", "v"))
    for name, spec in (("q", q), ("k", k), ("v", v)):
        if not 1 <= spec.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {spec.shape[3]}; it must lie between 1 and {MAX_HEAD_DIM}")
        if spec.shape[2] == 0:
            raise ValueError(f"{name} has 0 heads; it must have at least 1")
        if spec.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {spec.shape[0]}; it must be q's, {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]}; it must be q's, {q.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads; q's {q.shape[2]} heads need a divisor of {q.shape[2]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has seqlen {v.shape[1]}; it must be k's, {k.shape[1]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads; it must have as many as k, {k.shape[2]}")
    return q, k, v


def _check_per_head(views: Mapping[str, View], batch: int, num_heads: int) -> None:
    allowed = {"alibi_slopes": ((num_heads,), (batch, num_heads)), "sinks": ((num_heads,),)}
    for name, shapes in allowed.items():
        if name in views and views[name].shape not in shapes:
            raise ValueError(f"{name} has shape {views[name].shape}; it must be {' or '.join(map(str, shapes))}")


def _check_used_lengths(views: Mapping[str, View], batch: int) -> None:
    for name in ("seqused_q", "seqused_k"):
        if name in views and views[name].shape != (batch,):
            raise ValueError(f"{name} has shape {views[name].shape}; it must be (batch,) = ({batch},)")


def _check_results(views: Mapping[str, View], layout: str, out_shape: tuple[int, int, int, int]) -> None:
    """Shapes of what a forward returns and a backward takes."""
    batch, seqlen_q, num_heads, _ = out_shape
    rows = (batch, num_heads, seqlen_q)
    expected = dict.fromkeys(("out", "dout"), to_canonical(out_shape, layout)) | dict.fromkeys(("lse", "dlse"), rows)
    for name, shape in expected.items():
        if name in views and views[name].shape != shape:
            raise ValueError(f"{name} has shape {views[name].shape}; it must be {shape}")


def _check_strides(name: str, view: View) -> None:
    if not (view.is_contiguous if name in PACKED else view.is_row_contiguous):
        raise ValueError(f"{name} has strides {view.strides}; its last axis must be contiguous")


def _overlaps_itself(view: View) -> bool:
    """Whether two elements may share memory: true unless every axis steps over all shorter ones."""
    reach = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(view.shape, view.strides, strict=True)):
        if size > 1 and stride <= reach:
            return 0 not in view.shape
        reach += stride * (size - 1)
    return False


def _overlap(first: View, second: View) -> bool:
    """Whether two views share an element, exactly: heads interleaved in one allocation do not."""
    (first_start, first_end), (second_start, second_end) = _extent(first), _extent(second)
    if first_end <= second_start or second_end <= first_start:  # mostly, and NumPy takes longer to say so
        return False
    return np.shares_memory(_addresses(first), _addresses(second))


def _extent(view: View) -> tuple[int, int]:
    """Return the first address of a view and the one behind its last."""
    reaches = [(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]
    itemsize = ITEMSIZE[view.dtype]
    start = view.pointer + itemsize * sum(reach for reach in reaches if reach < 0)
    return start, view.pointer + itemsize * (1 + sum(reach for reach in reaches if reach > 0))


def _addresses(view: View) -> np.ndarray:
    """Return an array over the view's addresses, which may lie on a device; it must never be read."""
    itemsize = ITEMSIZE[view.dtype]
    array = _Addresses()
    array.__array_interface__ = {
        "version": 3,
        "data": (view.pointer, True),
        "shape": view.shape,
        "strides": tuple(stride * itemsize for stride in view.strides),
        "typestr": f"|V{itemsize}",
    }
    return np.asarray(array)


class _Addresses:
    """Carries ``__array_interface__``."""
