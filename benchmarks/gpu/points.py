"""Exact inference by the very kernels that bound boxes: a pair of bytes holds two points instead of
two ends.

For an interval, the metadata of a sparse weight (its two index bits) says by the weight's sign
which byte of a pair it meets, and all indices ^ 1 give the other end. If all of them name the first
byte, the first product is that of one point, and the second that of the other: the same launches,
on as many bytes, are the inference of two points. So with these kernels the bounds of a box cost
two inferences, but for what is not theirs; this is the yardstick that the benchmark times.
"""

from __future__ import annotations

from typing import Any

from qverify.kernels import Array
from qverify.kernels.fused import Fused
from qverify.kernels.packing import RECORD, PackedConv, PackedDense, PackedNetwork, Variant
from qverify.network import Network
from qverify.ops import Conv, Dense, Layout, Max, Requantize, Table
from qverify.propagate.device import Plan
from qverify.propagate.plan import make_plan

# Each end of the result comes from the same end of the input.
PLAIN = (Dense, Conv, Requantize, Layout, Max)
FIRST = 0x88  # four indices: entries 0 and 2 of two pairs, which are their first bytes


class PointsFused(Fused):
    """`Fused` with weights that ignore their signs; only for the sparse variant."""

    def pack_dense(self, *arguments: Any, **options: Any) -> PackedDense:
        """As `Fused.pack_dense`."""
        layer = super().pack_dense(*arguments, **options)
        _ignore_signs(layer.weights)
        return layer

    def pack_conv(self, *arguments: Any, **options: Any) -> PackedConv:
        """As `Fused.pack_conv`."""
        layer = super().pack_conv(*arguments, **options)
        _ignore_signs(layer.weights)
        return layer

    def pack_network(self, *arguments: Any, **options: Any) -> PackedNetwork:
        """As `Fused.pack_network`."""
        packed = super().pack_network(*arguments, **options)
        _ignore_signs(packed.records)
        return packed


def _ignore_signs(records: Array) -> None:
    each = RECORD[Variant.SPARSE]
    records.reshape(-1, each)[:, 4 * 128 :] = FIRST


def make_inference(network: Network, fused: Fused) -> Plan | None:
    """A plan whose `run(points, points)` gives the outputs of both arrays of points; None where the
    chosen variant has no metadata, or an op of the network mixes the two ends."""
    ops = [node.op for node in network.nodes]
    apart = all(isinstance(op, PLAIN) or (isinstance(op, Table) and op.monotone) for op in ops)
    if fused.variant is not Variant.SPARSE or not apart:
        return None
    plan = make_plan(network, PointsFused(fused.kernels, fused.variant, fused.module))
    weighted = sum(isinstance(op, Dense | Conv) for op in ops)
    return plan if _covered(plan) == weighted else None


def _covered(plan: Plan) -> int:
    """How many layers the fused kernels compute."""
    names = plan.launches()
    return sum(int(name.rsplit(" ", 1)[1]) if name.startswith("network") else 1 for name in names)
