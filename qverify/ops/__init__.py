"""The integer ops.

To add one: write its class in a file here, list it in ALL, and give it cases in tests/ops/cases.py.
"""

from qverify.ops.affine import Conv, Dense
from qverify.ops.base import AbstractOp
from qverify.ops.layout import Layout
from qverify.ops.pool import Max, Mean
from qverify.ops.requantize import FloatProgram, FloatStep, Requantize
from qverify.ops.softmax import Softmax
from qverify.ops.table import Pairwise, Table
from qverify.ops.types import Interval, Type, Unfit, joint_shape

ALL: tuple[type[AbstractOp], ...] = (
    Layout,
    Dense,
    Conv,
    Requantize,
    Table,
    Pairwise,
    Max,
    Mean,
    Softmax,
)

__all__ = [
    "ALL",
    "AbstractOp",
    "Conv",
    "Dense",
    "FloatProgram",
    "FloatStep",
    "Interval",
    "Layout",
    "Max",
    "Mean",
    "Pairwise",
    "Requantize",
    "Softmax",
    "Table",
    "Type",
    "Unfit",
    "joint_shape",
]
