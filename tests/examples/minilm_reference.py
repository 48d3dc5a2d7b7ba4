"""The same encoder the obvious way: one passage at a time, no padding, dense attention, float64 from end to end.

It shares no line with minilm.py, so that agreement between the two says something.
"""

from __future__ import annotations

import numpy as np
from scipy.special import erf, softmax

HEADS = 12
LAYERS = 6
EPSILON = 1e-12


def reference_embedding(weights: dict[str, np.ndarray], token_ids: list[int]) -> np.ndarray:
    """The (384,) unit vector of one passage; ``weights`` carry the names of the published checkpoint."""

    def w(name: str) -> np.ndarray:
        return weights[name].astype(np.float64)

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("si,oi->so", x, w(f"{name}.weight"), optimize=True) + w(f"{name}.bias")

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
        return scaled * w(f"{name}.weight") + w(f"{name}.bias")

    def heads(x: np.ndarray) -> np.ndarray:  # (seqlen, hidden) -> (heads, seqlen, head_dim)
        return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)

    ids = np.asarray(token_ids)
    x = w("embeddings.word_embeddings.weight")[ids]
    x = x + w("embeddings.position_embeddings.weight")[: len(ids)] + w("embeddings.token_type_embeddings.weight")[0]
    x = layer_norm(x, "embeddings.LayerNorm")
    for index in range(LAYERS):
        block = f"encoder.layer.{index}"
        q, k, v = (heads(dense(x, f"{block}.attention.self.{part}")) for part in ("query", "key", "value"))
        p = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]), axis=-1)
        mixed = (p @ v).transpose(1, 0, 2).reshape(x.shape)
        x = layer_norm(x + dense(mixed, f"{block}.attention.output.dense"), f"{block}.attention.output.LayerNorm")
        hidden = dense(x, f"{block}.intermediate.dense")
        hidden = 0.5 * hidden * (1.0 + erf(hidden / np.sqrt(2.0)))
        x = layer_norm(x + dense(hidden, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    pooled = x.mean(axis=0)
    return pooled / np.linalg.norm(pooled)
