"""Thresholds that lie on a line, and tables of two codes that are steps of a weighted sum; exact,
in small integers.

A requantization is a division up to its float32 rounding, and a quantized addition a sum. Found
again as such, they cost a solver one inequality or one sum, instead of 256 thresholds or 65,536
cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of least denominator strictly between two non-negative ones."""
    whole = low.numerator // low.denominator
    if whole + 1 < high:
        return Fraction(whole + 1)
    if low == whole:  # high <= whole + 1: the least n with whole + 1/n below high
        n = (1 / (high - whole)).__floor__() + 1
        return whole + Fraction(1, n)
    return whole + 1 / simplest(1 / (high - whole), 1 / (low - whole))


def common_slope(t: IntArray) -> Fraction | None:
    """The simplest slope s > 0 with every |t_j - t_i - (j - i) s| below 1, for increasing t; None
    if there is none."""
    if len(t) == 1:
        return Fraction(1)
    gap = np.arange(1, len(t))
    most = np.array([(t[g:] - t[:-g]).min() for g in gap])
    least = np.array([(t[g:] - t[:-g]).max() for g in gap])
    above = min(Fraction(int(m) + 1, int(g)) for m, g in zip(most, gap, strict=True))
    below = max(Fraction(int(m) - 1, int(g)) for m, g in zip(least, gap, strict=True))
    return simplest(max(below, Fraction(0)), above) if below < above else None


@dataclass(frozen=True)
class Additive:
    """table[a, b] = values[k] for the last k with starts[k] <= m a + n b; a and b count from 0."""

    m: int
    n: int
    starts: tuple[int, ...]
    values: tuple[int, ...]


def additive(table: IntArray) -> Additive | None:
    """`table` [Ka, Kb] as steps of a sum; None where it is none. What is returned was checked on
    every cell."""
    if min(table.shape) < 2:
        return None
    signs = [-1 if np.diff(table, axis=axis).sum() < 0 else 1 for axis in (0, 1)]
    rising = table[:: signs[0], :: signs[1]]
    if (np.diff(rising, axis=0) < 0).any() or (np.diff(rising, axis=1) < 0).any():
        return None
    ratio = _ratio(rising)
    if ratio is None:
        return None
    m, n = signs[0] * ratio.numerator, signs[1] * ratio.denominator
    sums = m * np.arange(table.shape[0])[:, None] + n * np.arange(table.shape[1])
    levels = np.unique(table)
    starts = [int(sums.min()), *(int(sums[table >= level].min()) for level in levels[1:])]
    if (levels[np.searchsorted(starts, sums, side="right") - 1] != table).any():
        return None
    return Additive(m, n, tuple(starts), tuple(levels.tolist()))


def _ratio(table: IntArray) -> Fraction | None:
    """The simplest s > 0 such that, at every level, s a + b is larger for all (a, b) that reach it
    than for all others.

    Comparing the first b of one a with the last b of another that does not reach it gives s (a -
    a') > need.
    """
    rows, columns = table.shape
    low, high = Fraction(0), Fraction(4 * max(table.shape))
    gap = np.arange(rows)[:, None] - np.arange(rows)
    inverse = 1.0 / np.where(gap == 0, 1, gap)
    for level in np.unique(table)[1:]:
        begin = (table < level).sum(axis=1)  # the least b that reaches the level
        asks = (begin < columns)[:, None] & (begin > 0)
        need = begin - begin[:, None] - 1
        bound = need * inverse  # floats pick the strictest pair; its bound is exact
        above, below = asks & (gap > 0), asks & (gap < 0)
        if above.any():
            k = int(np.where(above, bound, -np.inf).argmax())
            low = max(low, Fraction(int(need.flat[k]), int(gap.flat[k])))
        if below.any():
            k = int(np.where(below, bound, np.inf).argmin())
            high = min(high, Fraction(int(need.flat[k]), int(gap.flat[k])))
    return simplest(low, high) if low < high else None
