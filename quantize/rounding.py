"""Rounding that makes up for itself: each input's error is taken back by the inputs after it.

Frantar et al. 2022, GPTQ: of weights w and inputs x, sum((w x - q x)^2) is least where it is
measured, over inputs as they occur, whose second moments are `second`.
"""

from __future__ import annotations

import numpy as np

DAMP = 0.01  # of the mean second moment, added to all
BLOCK = 64  # inputs whose errors reach the rest at once
ROWS = 4096  # at a time, in the cache


class Rounder:
    """Of all weights that read the same inputs; `second` is (inputs, inputs)."""

    def __init__(self, second: np.ndarray) -> None:
        moments = np.asarray(second, np.float64)
        energy = np.diag(moments)
        self.importance = energy.astype(np.float32)  # of each input
        self._order = np.argsort(-energy, kind="stable")
        ordered = moments[np.ix_(self._order, self._order)]
        some = energy[self._order] > 0
        level = DAMP * (energy[energy > 0].mean() if some.any() else 1.0)
        ordered[np.diag_indices_from(ordered)] += np.where(some, level, max(level, 1.0))
        inverse = np.linalg.inv(ordered)
        self._upper = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)

    def __call__(self, rows: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
        """(rows, inputs) as int8 of low..high times `scales`, which broadcast to the rows."""
        values = np.empty(rows.shape, np.int8)
        scales = np.broadcast_to(scales, rows.shape)
        for first in range(0, len(rows), ROWS):
            part = slice(first, first + ROWS)
            self._round(values[part], rows[part], scales[part], low, high)
        return values

    def _round(
        self, values: np.ndarray, rows: np.ndarray, scales: np.ndarray, low: int, high: int
    ) -> None:
        """Inputs in the order of their energy: what comes late has little to make up with."""
        left = np.ascontiguousarray(rows.T[self._order], np.float32)  # what is wanted by now
        inverse = np.ascontiguousarray(1 / scales.T[self._order].astype(np.float32))
        found = np.empty(left.shape, np.float32)
        upper, count = self._upper, len(left)
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            errors = np.empty((end - start, left.shape[1]), np.float32)
            for i in range(start, end):
                whole = np.clip(np.rint(left[i] * inverse[i]), low, high)
                found[i] = whole
                errors[i - start] = (left[i] - whole / inverse[i]) / upper[i, i]
                if i + 1 < end:
                    left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
            if end < count:
                left[end:] -= upper[start:end, end:].T @ errors
        values.T[self._order] = found
