"""Where to split a box: one function per rule, each returning a code variable per box. Guides only.

Every rule returns a variable whose range holds more than one code, so each child is strictly
smaller than its parent: that, and the exactness of interval bounds on points, makes the search end
(see `bab.search`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qverify.kernels import Array, Kernels


@dataclass(frozen=True, eq=False)
class BranchingContext:
    """What a rule may look at: boxes int32 [N, codes] and, per box, the gradient float32 [N, codes]
    of the slack of the case that looks most unsafe, at the box's centre."""

    kernels: Kernels
    lower: Array
    upper: Array
    gradient: Array


def _steepness(context: BranchingContext) -> Array:
    """The gradient's magnitudes, finite (they may have overflowed), so that a width of zero makes a
    product of zero."""
    xp = context.kernels.xp
    return xp.fmin(xp.abs(context.gradient), xp.float32(1e30))


def widest(context: BranchingContext) -> Array:
    """The variable with the most codes left (the first of them): the 2023 paper's rule."""
    return (context.upper - context.lower).argmax(axis=1)


def influence(context: BranchingContext) -> Array:
    """The variable whose whole range moves the slack most, to first order; ties and flat gradients
    by width."""
    width = (context.upper - context.lower).astype(context.kernels.xp.float32)
    steep = _steepness(context)
    floor = 1e-3 * steep.max(axis=1, keepdims=True) + 1e-30
    return (width * (steep + floor)).argmax(axis=1)


def balanced(context: BranchingContext) -> Array:
    """Between the two: width times the square root of the gradient."""
    xp = context.kernels.xp
    width = (context.upper - context.lower).astype(xp.float32)
    steep = xp.sqrt(_steepness(context))
    floor = 0.05 * steep.max(axis=1, keepdims=True) + 1e-30
    return (width * (steep + floor)).argmax(axis=1)


RULES: dict[str, Callable[[BranchingContext], Array]] = {
    "influence": influence,
    "balanced": balanced,
    "widest": widest,
}


def split(kernels: Kernels, lower: Array, upper: Array, variable: Array) -> tuple[Array, Array]:
    """Both halves of every box along its variable, [2 N, codes]: codes <= t and codes >= t + 1
    share no point."""
    xp = kernels.xp
    rows = xp.arange(lower.shape[0])
    middle = (lower[rows, variable] + upper[rows, variable]) // 2
    left_upper, right_lower = upper.copy(), lower.copy()
    left_upper[rows, variable] = middle
    right_lower[rows, variable] = middle + 1
    return xp.concatenate([lower, right_lower]), xp.concatenate([left_upper, upper])
