"""What happens to a score between q.k and the mask: softcap and ALiBi now, user functions later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Modifiers:
    """The score terms of a problem, in the order of application: softcap, then ALiBi.

    ``softcap`` 0 is off; ``alibi`` says whether slopes are given, per head or (``alibi_per_batch``) per batch and head.

    >>> scores = np.array([[-100.0, 0.0, 1.0]])
    >>> Modifiers(softcap=2.0).apply(scores).round(3)
    array([[-2.   ,  0.   ,  0.924]])
    >>> Modifiers(alibi=True).apply(scores, slopes=0.5, distance=np.array([[-2, -1, 0]]))
    array([[-101. ,   -0.5,    1. ]])
    """

    softcap: float = 0.0
    alibi: bool = False
    alibi_per_batch: bool = False

    def apply(self, scores: np.ndarray, slopes: np.ndarray | None = None, distance: np.ndarray | None = None):
        """Modified scores of a tile; ``scores`` are softmax_scale * q.k and are left as they are.

        ``slopes`` broadcasts against the tile and ``distance``, the columns from the diagonal to each key
        (``Band.distance``), is read only with ALiBi.
        """
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.alibi:
            scores = scores - slopes * np.abs(distance).astype(scores.dtype)
        return scores

    def derivative(self, scores: np.ndarray) -> np.ndarray | float:
        """Derivative of the modified scores by the unmodified ``scores``; ALiBi only shifts and has derivative 1."""
        if not self.softcap:
            return 1.0
        return 1.0 - np.tanh(scores / self.softcap) ** 2
