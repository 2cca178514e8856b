"""What training minimises, and on which schedule: the 2023 paper's recipe, and ours.

A recipe is asked for the learning rate and the loss at every step, by `progress` in [0, 1]. Boxes
are in pixels (0..255).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from qverify.train.codes import PIXELS, Sums
from qverify.train.layers import Affine, QuantizedNetwork

TOLERANCE = 0.5  # of the warm-up regularisers (Shi et al., NeurIPS 2021)


class Recipe(Protocol):
    """How a network is trained against perturbations of `eps` pixels."""

    peak_rate: float
    ramped: float  # the part of the run after which eps is whole
    weight_decay: float
    clip_norm: float | None

    def start(self, network: QuantizedNetwork) -> None:
        """Initialise the weights."""

    def rate(self, progress: float) -> float:
        """The learning rate."""

    def loss(
        self,
        network: QuantizedNetwork,
        pixels: Tensor,
        labels: Tensor,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss of a batch: pixels float32 [B, *shape], labels int64 [B]."""


def ramp(progress: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, straight between."""
    if end <= start:
        return 1.0
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def box(pixels: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """All pixels within `eps`, and within 0..255."""
    return (pixels - eps).clamp(0, PIXELS), (pixels + eps).clamp(0, PIXELS)


def worst_case(margins: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the worst logits that a box allows, up to a shift.

    They are -margin for every class, 0 for the label.
    """
    return functional.cross_entropy(-margins, labels)


def attack(
    network: QuantizedNetwork,
    pixels: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Projected gradient ascent on the cross entropy within `eps` pixels, by straight-through
    gradients."""
    lower, upper = box(pixels, eps)
    noise = torch.rand(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
    point = torch.lerp(lower, upper, noise)
    size = 2.0 * eps / (steps + 1)
    training = network.training
    network.eval()  # an attack's batches are not to move running statistics and ranges
    for _ in range(steps):
        point.requires_grad_(True)
        logits = network(point).logits
        assert logits is not None
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels), point)
        point = torch.minimum(torch.maximum(point.detach() + size * gradient.sign(), lower), upper)
    network.train(training)
    return point.detach()


def spreads(trace: list[Sums]) -> Tensor:
    """The mean width of every layer's accumulators over their boxes, in real units."""
    widths = [
        2.0 * (sums.radius.transpose(1, -1) * sums.scale).mean()
        for sums in trace
        if sums.radius is not None
    ]
    return torch.stack(widths)


def regularisers(trace: list[Sums], width: float) -> Tensor:
    """Shi et al. 2021: layers should not widen boxes, and active and inactive neurons should
    balance.

    `width` is the input's mean width, in real units. Sums without a box (the last layer's, of
    points) are left out.
    """
    total = torch.zeros(())
    layers = [sums for sums in trace if sums.centre is not None and sums.radius is not None]
    for sums in layers:
        assert sums.centre is not None and sums.radius is not None
        centre = sums.centre.transpose(1, -1) * sums.scale
        radius = sums.radius.transpose(1, -1) * sums.scale
        tight = width / (2 * radius.mean()).clamp_min(1e-12)
        total = total + functional.relu(TOLERANCE - tight) / TOLERANCE
        active, inactive = centre > radius, centre < -radius
        spread = (centre - centre.mean()) ** 2
        for part, sign in ((centre, -1.0), (spread, 1.0)):
            ratio = (part * active).sum() / (sign * (part * inactive).sum()).clamp_min(1e-12)
            ratio = torch.minimum(ratio, 1 / ratio.clamp_min(1e-12))
            total = total + functional.relu(TOLERANCE - ratio) / TOLERANCE
    return total / max(1, len(layers))


@dataclass
class Qverify:
    """Cross entropy on worst-case logits of a box inside the ball.

    Mixed with that of clean or attacked images.

    `mix` is the weight of the box's term. The box has the radius `shrink` * eps around an attacked
    point whose box stays in the ball (SABR: Mueller et al., ICLR 2023); at 1 it is the whole ball.
    With `attack_steps` the other term is the attacked images' (MTL-IBP: De Palma et al., ICLR
    2024), without it the clean ones'. eps rises to `past` times the target, from `warm` to `ramped`
    (parts of the run). `regularise` weighs the warm-up regularisers of Shi et al., NeurIPS 2021,
    whose initialisation layers with normalisation get. Only the part `boxed` of each batch (in
    random order) has its boxes propagated, which cost twice as much as points: where `mix` is
    small, a few are enough. Their radii are drawn between `least` times eps and eps, evenly on a
    logarithmic scale: a network may be certified at several radii.
    """

    eps: float
    mix: float = 0.1
    shrink: float = 1.0
    boxed: float = 0.25
    least: float = 0.25
    attack_steps: int = 1
    past: float = 1.0
    peak_rate: float = 1e-3
    warm: float = 0.05
    ramped: float = 0.4
    regularise: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = 10.0

    def start(self, network: QuantizedNetwork) -> None:
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, Affine) and layer.norm:
                    layer.weight.normal_(0, math.sqrt(2 * math.pi) / layer.fan_in)

    def rate(self, progress: float) -> float:
        rise = 0.1 + 0.9 * ramp(progress, 0.0, self.warm)
        return (
            self.peak_rate * rise * 0.5 * (1 + math.cos(math.pi * ramp(progress, self.warm, 1.0)))
        )

    def _radii(self, eps: float, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """The radius of every image's ball [B, 1, ...], between `least` * eps and eps."""
        radii = torch.full([len(pixels), *[1] * (pixels.ndim - 1)], eps)
        if self.least < 1:
            radii *= self.least ** torch.rand(radii.shape, generator=generator)
        return radii.to(pixels.device)

    def loss(
        self,
        network: QuantizedNetwork,
        pixels: Tensor,
        labels: Tensor,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        part = ramp(progress, self.warm, self.ramped)
        eps, mix = self.eps * self.past * part, self.mix
        count = max(1, round(self.boxed * len(pixels)))
        attacked = pixels
        if self.attack_steps and eps > 0 and (mix < 1 or self.shrink < 1):
            attacked = attack(network, pixels, labels, eps, self.attack_steps, generator)
        point: Tensor | None = attacked
        ball = self._radii(eps, pixels[:count], generator)
        room = ball * (1 - self.shrink)
        middle = pixels[:count] + torch.clamp((attacked - pixels)[:count], -room, room)
        lower, upper = box(middle, ball * self.shrink)
        if mix >= 1 and not any(
            isinstance(layer, Affine) and layer.norm for layer in network.modules()
        ):
            point = None
        warming = part < 1 and self.regularise > 0
        trace: list[Sums] | None = [] if warming else None
        seen = network(point, lower, upper, labels[:count], trace)
        loss = mix * worst_case(seen.margins, labels[:count])
        if point is not None and mix < 1:
            loss = loss + (1 - mix) * functional.cross_entropy(seen.logits, labels)
        if trace is not None and eps > 0:
            width = float((upper - lower).mean()) / PIXELS
            loss = loss + self.regularise * (1 - part) * regularisers(trace, width)
        return loss


@dataclass
class Paper:
    """QA-IBP as released by Lechner et al.

    (AAAI 2023): clean cross entropy, a hinge on margins, and a width penalty.

    Everything rises linearly over the first 90 % of the steps: eps to the target + 0.1, the hinge's
    weight to 0.5, the penalty's to 0.001. The hinge (margin 0.2) counts correctly classified images
    only (`correct_only`, their choice for MNIST and Fashion-MNIST). Their rate of 1e-4 goes with 5
    million steps; `peak_rate` scales it to the budget at hand.
    """

    eps: float
    peak_rate: float = 1e-3
    margin: float = 0.2
    hinge: float = 0.5
    penalty: float = 1e-3
    correct_only: bool = True
    ramped: float = 0.9
    weight_decay: float = 5e-5
    clip_norm: float | None = None

    def start(self, network: QuantizedNetwork) -> None:
        """Their truncated normal of 0.2 needs their pre-training.

        He's initialisation (the layers' own) stands in.
        """

    def rate(self, progress: float) -> float:
        return self.peak_rate * (1.0, 0.3, 0.1)[min(2, int(3 * progress))]

    def loss(
        self,
        network: QuantizedNetwork,
        pixels: Tensor,
        labels: Tensor,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        part = ramp(progress, 0.0, self.ramped)
        trace: list[Sums] = []
        seen = network(pixels, *box(pixels, (self.eps + 0.1) * part), labels, trace)
        loss = functional.cross_entropy(seen.logits, labels)
        classes = seen.logits.shape[1]
        others = 1 - functional.one_hot(labels, classes)
        hinge = (functional.relu(self.margin - seen.margins) * others).sum(1) / classes
        if self.correct_only:
            hinge = hinge * (seen.logits.argmax(1) == labels)
        widths = spreads(trace)
        loss = loss + part * (self.hinge * hinge.mean() + self.penalty * widths.sum())
        return cast(Tensor, loss)
