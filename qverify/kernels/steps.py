"""Element by element in one pass: what the dual does for every element of its arrays, again and
again.

On a GPU the launches of many small operations cost more than their work. Here the same is one CUDA
kernel each; CuPy builds it around the C++ text of one element, `CORNER` or `DESCEND`. On a CPU it
stays NumPy's operations.

Both machines agree bit for bit on int64. Float32 is for guides only: CuPy flushes subnormals and
may fuse a product with a sum.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from qverify.kernels import Array, Kernels

# One element i of [N, R, *shape], `size` elements to a shape: y and z hold `corners` blocks,
# `block` apart, for m >= 0, and from y_fall or z_fall on those for m < 0; of a block an element's
# own subproblem is `batch` after the one before.
CORNER = """
    const ptrdiff_t at = i / (rows * size) * batch + i % size;
    const ptrdiff_t from_y = m >= 0 ? at : at + y_fall, from_z = m >= 0 ? at : at + z_fall;
    value = w * y[from_y] - m * z[from_z];
    ptrdiff_t chosen = 0;
    for (ptrdiff_t k = 1; k < corners; ++k) {
        const T own = w * y[from_y + k * block] - m * z[from_z + k * block];
        if (own > value) chosen = k;
        if (own > value || own != own) value = own;
    }
    best_y = y[from_y + chosen * block];
    best_z = z[from_z + chosen * block];
"""
SLACK = """
    value += (m < 0 ? -m : m) * slack;
"""
NUMBERS = ("rows", "size", "corners", "block", "batch", "y_fall", "z_fall")
CORNER_IN = ", ".join(["T w, T m, raw T y, raw T z", *(f"int64 {name}" for name in NUMBERS)])
CORNER_OUT = "T value, T best_y, T best_z"

# One element of a step of Adam; `first`, `second` and `mean` are brought up to date in place.
MEAN = """
    mean = share < 1 ? mean + share * (argument - mean) : argument;
"""
DESCEND = """
    const T gap = argument - z;
    first += 0.1f * (gap - first);
    second += 0.01f * (gap * gap - second);
    next = m - rate * size * first / (sqrtf(second) + 1e-9f);
    if (next < least) next = least;
"""

# One element i of [samples, channels, height, width] from columns [samples, *output, channels,
# *kernel]: the sum over taps.
FOLD = """
    const ptrdiff_t x = i % width, y = i / width % height, c = i / (width * height) % channels;
    const ptrdiff_t sample = i / (width * height * channels);
    sum = 0;
    for (ptrdiff_t a = 0; a < kernel_h; ++a) {
        const ptrdiff_t u = y - a * dilation_h;
        if (u < 0 || u % stride_h != 0 || u / stride_h >= output_h) continue;
        for (ptrdiff_t b = 0; b < kernel_w; ++b) {
            const ptrdiff_t v = x - b * dilation_w;
            if (v < 0 || v % stride_w != 0 || v / stride_w >= output_w) continue;
            const ptrdiff_t at = (sample * output_h + u / stride_h) * output_w + v / stride_w;
            sum += columns[((at * channels + c) * kernel_h + a) * kernel_w + b];
        }
    }
"""
SIDES = tuple(
    f"{name}_{side}" for name in ("output", "kernel", "stride", "dilation") for side in "hw"
)
FOLD_IN = ", ".join(
    ["raw T columns", *(f"int64 {name}" for name in ("channels", "height", "width", *SIDES))]
)

# name -> what CuPy's ElementwiseKernel takes: inputs, outputs, the text for one element
KERNELS = {
    "corner": (CORNER_IN, CORNER_OUT, CORNER),
    "corner_slack": (f"{CORNER_IN}, T slack", CORNER_OUT, CORNER + SLACK),
    "descend": (
        "T m, T argument, T z, T size, T rate, T least",
        "T next, T first, T second",
        DESCEND,
    ),
    "descend_mean": (
        "T m, T argument, T z, T size, T rate, T least, T share",
        "T next, T first, T second, T mean",
        DESCEND + MEAN,
    ),
    "fold": (FOLD_IN, "T sum", FOLD),
    "furthest": ("T w, T low, T high", "T best", "best = w > 0 ? high : low;"),
}


@functools.cache
def _kernel(xp: Any, name: str) -> Any:
    inputs, outputs, text = KERNELS[name]
    return xp.ElementwiseKernel(inputs, outputs, text, f"qverify_{name}")


@functools.cache
def _dot(xp: Any) -> Any:
    return xp.ReductionKernel("T x, T y", "T sum", "x * y", "a + b", "sum = a", "0", "qverify_dot")


@functools.cache
def _total(xp: Any, count: int) -> Any:
    names = [f"part{k}" for k in range(count)]
    inputs, text = ", ".join(f"T {name}" for name in names), " + ".join(names)
    return xp.ElementwiseKernel(inputs, "T whole", f"whole = {text}", f"qverify_total{count}")


def total(kernels: Kernels, parts: list[Array]) -> Array:
    """Their sum, from the first to the last."""
    if kernels.name == "cpu" or len(parts) < 3:
        return functools.reduce(lambda a, b: a + b, parts)
    return _total(kernels.xp, len(parts))(*parts)


def fold(
    kernels: Kernels,
    columns: Array,
    output: tuple[int, ...],
    padded: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Array:
    """Columns [N, groups, *output, channels, *kernel] added up where their taps meet the input: [N,
    groups, channels, *padded]. In the order of the taps, from 0."""
    xp, rank = kernels.xp, len(output)
    n, groups = columns.shape[:2]
    channels, kernel = columns.shape[2 + rank], columns.shape[3 + rank :]
    if kernels.name != "cpu" and rank <= 2:
        sides = [side for own in (output, kernel, strides, dilations) for side in (1, *own)[-2:]]
        result = xp.empty((n, groups, channels, *padded), dtype=columns.dtype)
        return _kernel(xp, "fold")(columns, channels, *(1, *padded)[-2:], *sides, result)
    result = xp.zeros((n, groups, channels, *padded), dtype=columns.dtype)
    for tap in itertools.product(*map(range, kernel)):
        where = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(tap, dilations, output, strides, strict=True)
        )
        part = columns[(..., *tap)]  # [N, groups, *output, channels]
        result[(slice(None), slice(None), slice(None), *where)] += xp.moveaxis(part, -1, 2)
    return result


def dot(kernels: Kernels, a: Array, b: Array) -> Array:
    """The sum of a * b over the elements: [N, R, *shape] and what broadcasts to it -> [N, R]."""
    if kernels.name == "cpu":
        product = a * b
        return product.reshape(*product.shape[:2], -1).sum(axis=2)
    return _dot(kernels.xp)(a, b, axis=tuple(range(2, a.ndim))) if a.ndim > 2 else a * b


@functools.cache
def _largest(xp: Any) -> Any:
    size = "x < 0 ? -(double)x : (double)x"  # not abs(x): that of -2**63 is negative
    return xp.ReductionKernel(
        "T x", "float64 size", size, "a > b ? a : b", "size = a", "0", "qverify_largest"
    )


def largest(kernels: Kernels, *xs: Array) -> list[float]:
    """The largest absolute value of each of some arrays of integers, in float64 (0 if it is empty).
    The host waits once."""
    if kernels.name == "cpu":
        return [max(float(x.max()), -float(x.min())) if x.size else 0.0 for x in xs]
    found = [_largest(kernels.xp)(x.reshape(-1), axis=(0,)) for x in xs if x.size]
    sizes = iter(kernels.to_host(kernels.xp.stack(found)).tolist() if found else [])
    return [next(sizes) if x.size else 0.0 for x in xs]


def furthest(kernels: Kernels, weights: Array, low: Array, high: Array) -> Array:
    """Where weights * x is largest for x in [low, high], element by element, all of one type."""
    if kernels.name == "cpu":
        return kernels.xp.where(weights > 0, high, low)
    return _kernel(kernels.xp, "furthest")(weights, low, high)


def best_corner(
    kernels: Kernels, weights: Array, multipliers: Array, z: Array, y: Array, slack: Array | None
) -> tuple[Array, Array, Array]:
    """(max over corners of weights * y - multipliers * z, plus |multipliers| slack, the corner's y
    and z), element by element: [N, R, *shape]. For z, y and slack see `qverify.ops.relax.Hull`; all
    of one type, int64 or float32.

    Integers must not leave int64. The first of several best corners is taken.
    """
    if kernels.name == "cpu":
        return _best_corner(kernels.xp, weights, multipliers, z, y, slack)
    xp, n = kernels.xp, max(len(weights), y.shape[2])
    if weights.shape != multipliers.shape or len(weights) < n:
        shape = (n, *weights.shape[1:])
        weights, multipliers = xp.broadcast_to(weights, shape), xp.broadcast_to(multipliers, shape)
    if y.shape[1:] != z.shape[1:]:
        raise ValueError(f"corners {y.shape} and {z.shape}")
    size = int(y[0, 0, 0].size)
    block, batch = y.shape[2] * size, size if y.shape[2] > 1 else 0
    falls = [block * own.shape[1] if len(own) > 1 else 0 for own in (y, z)]
    numbers = (weights.shape[1], size, y.shape[1], block, batch, *falls)
    if slack is None:
        best, best_y, best_z = _kernel(xp, "corner")(weights, multipliers, y, z, *numbers)
    else:
        best, best_y, best_z = _kernel(xp, "corner_slack")(
            weights, multipliers, y, z, *numbers, slack
        )
    return best, best_y, best_z


def _best_corner(
    xp: Any, weights: Array, multipliers: Array, z: Array, y: Array, slack: Array | None
) -> tuple[Array, Array, Array]:
    rising = multipliers >= 0
    best, best_y, best_z = None, None, None
    for k in range(z.shape[1]):
        own_y = y[0, k] if len(y) == 1 else xp.where(rising, y[0, k], y[1, k])
        own_z = z[0, k] if len(z) == 1 else xp.where(rising, z[0, k], z[1, k])
        value = weights * own_y
        value -= multipliers * own_z
        if best is None:
            best, best_y, best_z = (
                value,
                xp.broadcast_to(own_y, value.shape),
                xp.broadcast_to(own_z, value.shape),
            )
        else:
            better = value > best
            best = xp.maximum(best, value)
            best_y, best_z = xp.where(better, own_y, best_y), xp.where(better, own_z, best_z)
    if slack is not None:
        best = best + xp.abs(multipliers) * slack
    return best, best_y, best_z


def descend(
    kernels: Kernels,
    m: Array,
    argument: Array,
    z: Array | float,
    size: Array,
    moments: tuple[Array, Array],
    rate: float,
    least: float | None = None,
    mean: Array | None = None,
    share: float = 1.0,
) -> Array:
    """One step of Adam from m [N, ...] along the gradient argument - z, no lower than `least`;
    float32. The `moments` are brought up to date in place, and so is the running `mean` of
    arguments, into which this one goes with a `share`."""
    if kernels.name != "cpu":
        xp = kernels.xp
        floor = -xp.inf if least is None else least
        kept = () if mean is None else (mean,)
        own = _kernel(xp, "descend_mean" if kept else "descend")
        shares = (share,) if kept else ()
        return own(
            m,
            argument,
            z,
            size,
            rate,
            floor,
            *shares,
            xp.empty(m.shape, dtype=m.dtype),
            *moments,
            *kept,
        )[0]
    return _descend(kernels.xp, m, argument, z, size, moments, rate, least, mean, share)


def _descend(
    xp: Any,
    m: Array,
    argument: Array,
    z: Array | float,
    size: Array,
    moments: tuple[Array, Array],
    rate: float,
    least: float | None,
    mean: Array | None,
    share: float,
) -> Array:
    if mean is not None:
        if share < 1:
            mean += share * (argument - mean)
        else:
            mean[...] = argument
    first, second = moments
    gap = argument - z
    change = gap - first
    change *= 0.1
    first += change
    gap *= gap
    gap -= second
    gap *= 0.01
    second += gap
    xp.sqrt(second, out=gap)
    gap += 1e-9
    step = (rate * size) * first
    step /= gap
    xp.subtract(m, step, out=step)
    return step if least is None else xp.maximum(step, least)


def kept(kernels: Kernels, better: Array, new: list[Array], old: list[Array]) -> list[Array]:
    """The rows of `new` where `better` [N], those of `old` elsewhere. Neither is changed, but a
    result may be one of them."""
    xp = kernels.xp
    if kernels.name != "cpu":
        return [
            xp.where(better.reshape(-1, *([1] * (a.ndim - 1))), a, b)
            for a, b in zip(new, old, strict=True)
        ]
    rows = xp.flatnonzero(better)
    if len(rows) in (0, len(better)):
        return list(new if len(rows) else old)
    result = [b.copy() for b in old]
    for own, a in zip(result, new, strict=True):
        own[rows] = a[rows]
    return result
