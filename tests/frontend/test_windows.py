"""Windows of pools and convolutions against onnxruntime: every small size, kernel, stride, dilation
and way of padding.

The axes of a window do not know of each other, so that one axis is walked through in full, and two
are sampled.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from qverify.frontend.builder import Builder, Refusal
from qverify.frontend.registry import View
from qverify.frontend.rules.windows import read_window, window_index
from qverify.frontend.tensors import Codes
from qverify.ops import Type
from tests.graphs import Array, Graph

U8 = np.dtype(np.uint8)
PADDINGS: tuple[dict[str, Any], ...] = (
    *({}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}),
    *({"pads": [1, 0]}, {"pads": [0, 1]}, {"pads": [2, 1]}),
)
EXPECTED = ("wholly in the padding", "of a convolution with dilations")  # what qverify may refuse


def runtime(graph: Graph, output: str, feed: Array) -> Array | None:
    """What onnxruntime computes; None where it rejects the node."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(graph.model(output).SerializeToString(), options)
        return np.asarray(session.run(None, {"x0": feed})[0])
    except Exception:  # onnxruntime's own classes
        return None


def taps(
    op: str, shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any], pool: bool
) -> Array:
    """[1, channels, *output, taps]: the flat index of each tap, -1 in the padding."""
    node = helper.make_node(op, ["x"], ["y"], **attributes)
    x = Codes(0, Type(shape, 0, 255), U8)
    return window_index(
        x, read_window(View(node, [x], Builder(), 13, [], None), shape[2:], kernel, pool)
    )


def differs(
    pool: bool, spatial: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
) -> str | None:
    """What is wrong with the windows of a MaxPool or of a ConvInteger; None if nothing is."""
    shape, g = (1, 1, *spatial), Graph(13)
    feed = (
        np.random.default_rng(1)
        .permutation(256)[: np.prod(spatial)]
        .reshape(shape)
        .astype(np.uint8)
    )
    weight = (2 ** np.arange(np.prod(kernel)) % 127 + 1).astype(np.uint8)
    if pool:
        want = runtime(
            g, g.node("MaxPool", g.input(shape, U8), kernel_shape=list(kernel), **attributes), feed
        )
    else:
        w = g.const(weight.reshape(1, 1, *kernel))
        want = runtime(g, g.node("ConvInteger", g.input(shape, U8), w, **attributes), feed)
    if want is None or want.size == 0:
        return None
    try:
        index = taps("MaxPool" if pool else "ConvInteger", shape, kernel, attributes, pool)
    except Refusal as refusal:
        return None if any(words in str(refusal) for words in EXPECTED) else str(refusal)
    values = np.where(index < 0, 0, feed.reshape(-1)[index].astype(np.int64))
    got = values.max(axis=-1) if pool else (values * weight).sum(axis=-1)
    same = got.shape == want.shape and bool((got == want).all())
    return None if same else f"{got.tolist()} instead of {want.tolist()}"


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "convolution"])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_windows_of_one_axis(pool: bool, padding: dict[str, Any]) -> None:
    for size, kernel, stride, dilation in itertools.product(
        range(1, 8), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2)
    ):
        for ceil_mode in (0, 1) if pool else (0,):
            attributes = {"strides": [stride], "dilations": [dilation], **padding}
            if ceil_mode:
                attributes["ceil_mode"] = 1
            wrong = differs(pool, (size,), (kernel,), attributes)
            assert wrong is None, f"{size} elements, kernel {kernel}, {attributes}: {wrong}"


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "convolution"])
def test_windows_of_two_axes(pool: bool) -> None:
    rng = np.random.default_rng(7)
    for _ in range(400):
        spatial, kernel = (
            tuple(rng.integers(1, 10, 2).tolist()),
            tuple(rng.integers(1, 5, 2).tolist()),
        )
        attributes: dict[str, Any] = {"strides": rng.integers(1, 6, 2).tolist()}
        attributes["auto_pad"] = str(rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]))
        if pool and rng.random() < 0.5:
            attributes |= {"ceil_mode": 1, "dilations": rng.integers(1, 3, 2).tolist()}
        wrong = differs(pool, spatial, kernel, attributes)
        assert wrong is None, f"{spatial}, kernel {kernel}, {attributes}: {wrong}"
