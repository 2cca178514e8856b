"""The order of additions in a float mean, for every pattern of axes, ones among their sizes: k kept
or r reduced.

A mean that qverify reads must be onnxruntime's to the last bit; which patterns it reads is written
down here as well.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qverify.errors import UnsupportedModel
from tests.frontend.test_onnxruntime_ops import Case, compare
from tests.graphs import Graph

U8 = np.dtype(np.uint8)


def case(shape: tuple[int, ...], axes: list[int], opset: int) -> Case:
    g = Graph(opset)
    x = g.dequantize(g.input(shape, U8), np.float32(0.123456), np.array(77, np.uint8))
    more: dict[str, Any] = {"keepdims": 0}
    y = (
        g.node("ReduceMean", x, axes=axes, **more)
        if opset < 18
        else g.node("ReduceMean", x, g.const(axes), **more)
    )
    return Case(g.model(y), (np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8),))


def is_read(shape: tuple[int, ...], axes: list[int]) -> bool:
    """R, KR, RK, KRK behind a first element alone, and what adds at most two elements."""
    count = int(np.prod([shape[a] for a in axes]))
    kept_first = int(np.prod(shape[: axes[0]]))
    groups = re.sub(r"(.)\1*", r"\1", "".join("r" if a in axes else "k" for a in range(len(shape))))
    if count == 1 or groups in ("r", "kr", "rk"):
        return True
    return groups == "krk" and (kept_first == 1 or count <= 2)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_every_pattern_of_axes(rank: int, tmp_path: Path) -> None:
    sizes = {1: (1, 2, 9, 130), 2: (1, 2, 5, 9), 3: (1, 2, 9), 4: (1, 5)}[rank]
    for shape in itertools.product(sizes, repeat=rank):
        for chosen in range(1, 2**rank):
            axes = [axis for axis in range(rank) if chosen >> axis & 1]
            one = case(shape, axes, 13 if chosen % 2 else 21)
            if is_read(shape, axes):
                assert compare(one, tmp_path / "mean.onnx") > 0, f"{shape} over {axes}"
                continue
            with pytest.raises(UnsupportedModel, match="neither the trailing nor the leading"):
                compare(one, tmp_path / "mean.onnx")
