"""cuflash itself: on CuPy arrays, through the planner or with one backend named, and on NumPy arrays."""

from __future__ import annotations

from benchmarks.providers.base import Bound, Provider, Unavailable, missing_feature
from benchmarks.timing import Clock, EventClock, HostClock
from benchmarks.workloads import Cell

FEATURES = ("dropout", "alibi", "softcap", "sinks", "deterministic")
EXTRA_ARRAYS = ("alibi_slopes", "sinks")


class Cuflash(Provider):
    """The public functions ``attention`` and ``attention_backward`` on canonical arrays."""

    def __init__(self, name: str = "cuflash", backend: str | None = None):
        self.name, self.kernels = name, backend

    def load(self) -> None:
        try:
            import cupy

            cupy.cuda.runtime.getDeviceCount()
        except Exception as error:
            raise Unavailable(f"needs CuPy and a GPU: {error}") from error

    def clock(self) -> Clock:
        return EventClock()

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        if cell.dtype in ("float32", "float64"):
            return f"its kernels do not take {cell.dtype}"
        if cell.deterministic and pass_ == "fwd":
            return "is always deterministic forward"
        return missing_feature(cell, FEATURES, window=True)

    def bind(self, cell: Cell, arrays: dict) -> Bound:
        import cuflash

        keywords = {**cell.attention_keywords(), "backend": self.kernels}
        keywords |= {name: arrays[name] for name in EXTRA_ARRAYS if name in arrays}
        q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
        saved: list = []

        def forward():
            return cuflash.attention(q, k, v, return_lse=True, **keywords)

        def backward():
            if not saved:
                saved.append(forward())
            out, lse = saved[0]
            return cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=cell.deterministic, **keywords)

        return Bound(
            forward,
            backward,
            outputs=lambda result: {"out": result[0]},
            gradients=lambda result: {"dq": result.dq, "dk": result.dk, "dv": result.dv},
        )


class CuflashNumpy(Cuflash):
    """The NumPy backend, on the processor."""

    device = "cpu"

    def __init__(self):
        super().__init__("cuflash_numpy", backend="numpy")

    def load(self) -> None:
        """Always there."""

    def clock(self) -> Clock:
        return HostClock()

    def unsupported(self, cell: Cell, pass_: str) -> str | None:
        return None if cell.batch * cell.num_heads * cell.visible_pairs() <= 1 << 28 else "would take minutes"
