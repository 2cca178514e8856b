"""An op with a band, for tests: what the float sums of a runtime do to codes.

A float that is known only up to an error is rounded to codes. Away from ties that changes nothing;
near one, the code may be one of two, and the runtime's order of additions decides which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from qverify.kernels import Array, Kernels
from qverify.network import Network
from qverify.ops import AbstractOp, FloatProgram, Interval, Requantize, Type
from tests.ops.cases import Case, bits3, bits4, s8, u8

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Blurred(AbstractOp):
    """A requantization whose float is known up to `band`.

    Sound because adding a constant and rounding are monotone: every float within the band of the
    nominal one gives a code between `least` and `most`.
    """

    nominal: Requantize
    band: float
    least: Requantize = field(init=False)
    most: Requantize = field(init=False)

    def __post_init__(self) -> None:
        for name, shift in (("least", -self.band), ("most", self.band)):
            program = self.nominal.program.then("add", shift)
            object.__setattr__(self, name, replace(self.nominal, program=program))

    @property
    def exact(self) -> bool:
        return False

    def output_type(self, *types: Type) -> Type:
        return self.nominal.output_type(*types)

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        return self.nominal.run(kernels, *xs)

    def interval(self, kernels: Kernels, *boxes: Interval) -> Interval:
        return self.least.interval(kernels, *boxes)[0], self.most.interval(kernels, *boxes)[1]

    def gradient(
        self, kernels: Kernels, xs: tuple[Array, ...], upstream: Array
    ) -> tuple[Array, ...]:
        return self.nominal.gradient(kernels, xs, upstream)


@dataclass(frozen=True, eq=False)
class SomeOrder(Blurred):
    """What one runtime makes of a blurred op: each element is the least code, the nominal or the
    largest, by a hash of the sample's values."""

    seed: int = 0

    def run(self, kernels: Kernels, *xs: Array) -> Array:
        choices = [op.run(kernels, *xs) for op in (self.least, self.nominal, self.most)]
        flat = xs[0].reshape(len(xs[0]), -1).astype(np.int64)
        mixed = flat @ (np.arange(flat.shape[1]) * 7919 + 31) + self.seed
        element = np.arange(choices[0][0].size).reshape(choices[0].shape[1:]) * 104_729
        chosen = (mixed.reshape(-1, *([1] * element.ndim)) + element) * 2_654_435_761 >> 7
        return np.choose(chosen % 3, choices).astype(np.int32)


def blurred(rng: Rng, network: Network, share: float = 0.7) -> Network:
    """The network with a band at some of its requantizations, up to 0.4 codes wide on each side."""
    nodes = [
        replace(node, op=Blurred(node.op, float(rng.uniform(0.02, 0.4))))
        if isinstance(node.op, Requantize) and rng.random() < share
        else node
        for node in network.nodes
    ]
    return replace(network, nodes=tuple(nodes))


def in_some_order(network: Network, seed: int) -> Network:
    """What one runtime computes for a network with bands: every value lies within them."""
    nodes = [
        replace(node, op=SomeOrder(node.op.nominal, node.op.band, seed=seed + k))
        if isinstance(node.op, Blurred)
        else node
        for k, node in enumerate(network.nodes)
    ]
    return replace(network, nodes=tuple(nodes))


def banded() -> Iterator[Case]:
    """Small instances of it, on all boxes and on some."""

    def scaled(scale: float, low: int, high: int, zero: int = 0) -> Requantize:
        return Requantize(FloatProgram().then("mul", scale), np.asarray(zero, np.int32), low, high)

    yield Case("of 3 bits", Blurred(scaled(0.5, 0, 7), 0.25), (bits3(2),))
    yield Case("falling", Blurred(scaled(-0.75, -8, 7, 3), 0.3), (bits4(1),))
    yield Case("wider than a code", Blurred(scaled(1.5, -8, 7), 1.5), (bits4(2),))
    yield Case("of 8 bits", Blurred(scaled(0.3, -128, 127, 5), 0.05), (u8(2, 3),))
    yield Case("of signed codes", Blurred(scaled(2.0, 0, 255, 128), 0.5), (s8(4),))


BANDED = tuple(banded())
