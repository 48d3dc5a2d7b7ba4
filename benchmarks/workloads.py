"""The problems that are measured, as data: every cell of the speed tables and the groups that name them."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cuflash.masks import Mask

TOKENS = 16384  # batch * seqlen, until one sequence is longer than that
HIDDEN = 2048  # num_heads * head_dim
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
FEATURE_LENGTHS = (2048, 8192)

# Products of (seqlen_q, head_dim) by (head_dim, seqlen_k) and their kin, two in the forward pass. The backward counts
# five by the field's convention (2.5 times the forward), the recomputed scores included.
PASS_FACTOR = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem: shapes, dtype, mask and feature, named the way the tables name it."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    mask: str = "full"  # full | causal | window<N>: causal, N keys to the left besides the diagonal
    feature: str = "plain"  # plain | dropout<p> | alibi | softcap<c> | sinks | deterministic
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Name used on the command line.

        >>> Cell(2, 8192, 8192, 16, 16, 128, 128, "causal").name
        'd128-causal-8k'
        """
        width = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}v{self.head_dim_v}"
        lengths = dict.fromkeys(map(short_length, (self.seqlen_q, self.seqlen_k)))
        parts = [f"d{width}", self.mask, "x".join(lengths)]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"gqa{self.num_heads}x{self.num_kv_heads}")
        if self.feature != "plain":
            parts.append(self.feature)
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        return "-".join(parts)

    @property
    def window_left(self) -> int | None:
        """Keys visible left of the diagonal, for a window mask."""
        match = re.fullmatch(r"window(\d+)", self.mask)
        return int(match.group(1)) if match else None

    @property
    def causal(self) -> bool:
        return self.mask != "full"

    @property
    def dropout_p(self) -> float:
        return float(self.feature.removeprefix("dropout")) if self.feature.startswith("dropout") else 0.0

    @property
    def softcap(self) -> float:
        return float(self.feature.removeprefix("softcap")) if self.feature.startswith("softcap") else 0.0

    @property
    def plain(self) -> Cell:
        """The cell that a feature, a window or another dtype is compared with."""
        mask = "causal" if self.window_left is not None else self.mask
        return dataclasses.replace(self, mask=mask, feature="plain", dtype="bfloat16")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def deterministic(self) -> bool:
        return self.feature == "deterministic"

    def visible_pairs(self) -> float:
        """(query, key) pairs of one head whose score counts; the causal mask counts as half, as the field does."""
        if self.mask == "full":
            return self.seqlen_q * self.seqlen_k
        if self.mask == "causal" and self.seqlen_q == self.seqlen_k:
            return self.seqlen_q * self.seqlen_k / 2
        return Mask(left=self.window_left, right=0).band(self.seqlen_q, self.seqlen_k).num_pairs()

    def flops(self, pass_: str) -> float:
        """Floating-point operations of a pass: 4 * B * H * Sq * Sk * D forward over the visible pairs."""
        width = self.head_dim + self.head_dim_v
        return 2 * self.batch * self.num_heads * self.visible_pairs() * width * PASS_FACTOR[pass_]

    def attention_keywords(self) -> dict[str, object]:
        """The keywords of ``cuflash.attention`` that need no array."""
        keywords: dict[str, object] = {"causal": self.causal}
        if self.window_left is not None:
            keywords["window_size"] = (self.window_left, 0)
        if self.softcap:
            keywords["softcap"] = self.softcap
        if self.dropout_p:
            keywords |= {"dropout_p": self.dropout_p, "seed": DROPOUT_SEED}
        return keywords

    def problem_columns(self) -> dict[str, object]:
        return dataclasses.asdict(self)


DROPOUT_SEED = 20260


def short_length(length: int) -> str:
    """2048 -> '2k', 113 -> '113'."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def square(head_dim: int, seqlen: int, mask: str = "full", **changes: object) -> Cell:
    """A cell of the field's convention: 16384 tokens, hidden size 2048, as many keys as queries."""
    heads = HIDDEN // head_dim
    cell = Cell(max(1, TOKENS // seqlen), seqlen, seqlen, heads, heads, head_dim, head_dim, mask)
    return dataclasses.replace(cell, **changes)


# What the features are held against: their own plain cell, in the same run.
FEATURES: tuple[dict[str, str], ...] = (
    {},
    {"mask": "window1024"},
    *({"feature": name} for name in ("alibi", "softcap30", "sinks", "dropout0.1", "deterministic")),
    {"dtype": "float16"},
)

GROUPS: dict[str, tuple[Cell, ...]] = {
    "hopper": tuple(square(d, s, mask) for d in (64, 128, 256) for mask in ("full", "causal") for s in LENGTHS),
    "gqa": tuple(
        square(128, s, mask, num_heads=64, num_kv_heads=8) for mask in ("full", "causal") for s in LENGTHS[:-1]
    ),
    "few": tuple(
        Cell(16, queries, 8192, 64, 8, d, d, "causal") for d in (64, 128) for queries in (1, 16, 64)
    ),
    "features": tuple(
        square(d, s, **{"mask": "causal", **change}) for d in (64, 128) for s in FEATURE_LENGTHS for change in FEATURES
    ),
    "unequal": tuple(
        square(192, s, "causal", num_heads=16, num_kv_heads=16, head_dim_v=128) for s in FEATURE_LENGTHS
    ),
    "portable": tuple(
        square(d, s, mask) for d in (64, 128, 256) for mask in ("full", "causal") for s in (512, 2048, 8192, 16384)
    ),
    "dropout": tuple(
        square(d, s, mask, feature="dropout0.1") for d in (64, 128) for mask in ("full", "causal")
        for s in FEATURE_LENGTHS
    ),
    "long": tuple(square(128, s, "causal") for s in (32768, 65536, 131072)),
    # Small enough for a processor; shows that the programme works, says nothing about speed.
    "smoke": (
        Cell(1, 128, 128, 2, 1, 32, 32, "causal", dtype="float32"),
        Cell(1, 113, 203, 2, 2, 64, 64, "full", dtype="float32"),
        Cell(1, 128, 128, 2, 2, 32, 32, "causal", "dropout0.1", dtype="float32"),
    ),
}  # fmt: skip


def select(patterns: Iterable[str]) -> list[Cell]:
    """Cells named by group or by a shell pattern on their names, in order and without repeats.

    >>> [cell.name for cell in select(["d64-causal-*k"])][:2]
    ['d64-causal-1k', 'd64-causal-2k']
    """
    every = [cell for group in GROUPS.values() for cell in group]
    chosen: dict[Cell, None] = {}
    for pattern in patterns:
        found = GROUPS.get(pattern) or [cell for cell in every if fnmatch.fnmatchcase(cell.name, pattern)]
        if not found:
            raise ValueError(f"no cell or group is named {pattern!r}; the groups are {', '.join(GROUPS)}")
        chosen |= dict.fromkeys(found)
    return list(chosen)
