"""Methods of `Kernels` under their old names, for `bounds` and `search` until they use the
methods."""

from __future__ import annotations

from typing import Any

from qverify.kernels import Array, Kernels


def total(kernels: Kernels, parts: list[Array]) -> Array:
    """`Kernels.total`."""
    return kernels.total(parts)


def dot(kernels: Kernels, a: Array, b: Array) -> Array:
    """`Kernels.dot`."""
    return kernels.dot(a, b)


def largest(kernels: Kernels, *xs: Array) -> list[float]:
    """`Kernels.largest`."""
    return kernels.largest(*xs)


def descend(kernels: Kernels, *args: Any, **options: Any) -> Array:
    """`Kernels.descend`."""
    return kernels.descend(*args, **options)


def kept(kernels: Kernels, better: Array, new: list[Array], old: list[Array]) -> list[Array]:
    """`Kernels.rows_where`."""
    return kernels.rows_where(better, new, old)
