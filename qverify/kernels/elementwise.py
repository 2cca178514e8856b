"""The C++ text of the CUDA kernels that work element by element: what the dual does for every
element of its arrays, again and again.

On a GPU the launches of many small operations cost more than their work. Here the same is one CUDA
kernel each, which CuPy builds around the text for one element. Integers are computed as on a CPU,
bit for bit. Float32 is for guides only: CuPy flushes subnormals and may fuse a product with a sum.
"""

from __future__ import annotations

import functools
from typing import Any

# One element i of [N, R, *shape], `size` elements to a shape: y and z hold `corners` blocks,
# `block` apart, for m >= 0, and from y_fall or z_fall on those for m < 0; in a block, the
# elements of a subproblem begin `batch` after those of the one before.
CORNER = """
    const ptrdiff_t at = i / (rows * size) * batch + i % size;
    const ptrdiff_t from_y = m >= 0 ? at : at + y_fall, from_z = m >= 0 ? at : at + z_fall;
    value = w * y[from_y] - m * z[from_z];
    ptrdiff_t chosen = 0;
    for (ptrdiff_t k = 1; k < corners; ++k) {
        const T next = w * y[from_y + k * block] - m * z[from_z + k * block];
        if (next > value) chosen = k;
        if (next > value || next != next) value = next;
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
def kernel(xp: Any, name: str) -> Any:
    """One of KERNELS, compiled on its first use."""
    inputs, outputs, text = KERNELS[name]
    return xp.ElementwiseKernel(inputs, outputs, text, f"qverify_{name}")


@functools.cache
def total_kernel(xp: Any, count: int) -> Any:
    """The sum of `count` arrays, from the first to the last."""
    names = [f"part{k}" for k in range(count)]
    inputs, text = ", ".join(f"T {name}" for name in names), " + ".join(names)
    return xp.ElementwiseKernel(inputs, "T whole", f"whole = {text}", f"qverify_total{count}")


@functools.cache
def dot_kernel(xp: Any) -> Any:
    """The sum of x * y."""
    return xp.ReductionKernel("T x, T y", "T sum", "x * y", "a + b", "sum = a", "0", "qverify_dot")


@functools.cache
def largest_kernel(xp: Any) -> Any:
    """The largest absolute value, in float64."""
    size = "x < 0 ? -(double)x : (double)x"  # not abs(x): that of -2**63 is negative
    return xp.ReductionKernel(
        "T x", "float64 size", size, "a > b ? a : b", "size = a", "0", "qverify_largest"
    )
