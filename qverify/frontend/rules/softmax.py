"""com.microsoft QLinearSoftmax."""

from __future__ import annotations

import numpy as np

from qverify import runtime
from qverify.frontend.builder import Refusal
from qverify.frontend.registry import MICROSOFT, View, checked_axis, lowers, scalar
from qverify.frontend.rules.layout import indices
from qverify.frontend.rules.quantize import EIGHT_BIT
from qverify.frontend.tensors import Codes, Tensor
from qverify.ops import Softmax

OLDEST = (1, 32)  # the runtime whose arithmetic `Softmax` is; earlier ones round otherwise


@lowers("QLinearSoftmax", inputs=5, attributes="axis opset", domains=(MICROSOFT,))
def qlinear_softmax(n: View) -> Tensor:
    """Over one axis (opset 13 semantics), or over all axes from `axis` on (before 13), as the
    attribute `opset` says."""
    x = n.codes(0)
    if x.dtype not in EIGHT_BIT:
        raise Refusal(f"its input is {x.dtype} (uint8 and int8 are supported)")
    rank = len(x.shape)
    modern = n.attr("opset", 13) >= 13
    axis = checked_axis(n.attr("axis", -1), rank)
    moved = indices(x)
    shape = moved.shape
    if modern:
        moved = np.moveaxis(moved, axis, -1)
        shape = moved.shape
        rows = moved.reshape(-1, shape[-1])
    else:
        rows = moved.reshape(int(np.prod(shape[:axis], dtype=np.int64)), -1)
    y_zero = n.constant(4, "the output zero point") if n.has(4) else np.zeros((), x.dtype)
    if y_zero.dtype != x.dtype:
        raise Refusal(f"an output of {y_zero.dtype} from {x.dtype} is not supported")
    info = np.iinfo(np.uint8 if x.dtype == np.uint8 else np.int8)
    op = Softmax(
        scale=np.float32(scalar(n.scale(1, "the scale"), "the scale")),
        y_scale=np.float32(scalar(n.scale(3, "the output scale"), "the output scale")),
        low=int(info.min),
        high=int(info.max),
        zero_point=int(scalar(y_zero, "the output zero point")),
        length=rows.shape[-1],
    )
    if runtime.release() < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise Refusal(
            f"onnxruntime {runtime.version()} rounds this op otherwise: install {wanted} or newer"
        )
    flat = n.builder.move(x, rows)
    assert isinstance(flat, Codes)
    y = n.builder.emit(op, flat, dtype=x.dtype)
    back = indices(y).reshape(shape)
    return n.builder.move(y, np.moveaxis(back, -1, axis) if modern else back)
