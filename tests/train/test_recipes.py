"""What the recipes minimise."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from qverify.train.layers import QuantizedNetwork  # noqa: E402
from qverify.train.models import Precision, make_model  # noqa: E402
from qverify.train.recipes import (  # noqa: E402
    Paper,
    Qverify,
    attack,
    box,
    ramp,
    regularisers,
    spreads,
    worst_case,
)

COUNT = 24


def batch() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (COUNT, 1, 6, 6), generator=generator).float()
    return pixels, torch.arange(COUNT) % 3


def made(norm: bool = False, precision: Precision | None = None) -> QuantizedNetwork:
    torch.manual_seed(0)
    network = make_model("mlp", (1, 6, 6), 3, precision or Precision(), norm)
    pixels, labels = batch()
    network(pixels, *box(pixels, 4.0), labels)  # scales see data
    return network


class Watched:
    """A network that notes what it is asked."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.network = network
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(
        self,
        point: Any,
        lower: Any = None,
        upper: Any = None,
        labels: Any = None,
        trace: Any = None,
    ) -> Any:
        self.calls.append((point, lower, upper))
        return self.network(point, lower, upper, labels, trace)


def generator() -> Any:
    return torch.Generator().manual_seed(1)


def test_boxes_end_where_pixels_do() -> None:
    lower, upper = box(torch.tensor([0.0, 3.0, 100.0, 254.0]), 4.0)
    assert lower.tolist() == [0, 0, 96, 250] and upper.tolist() == [4, 7, 104, 255]


def test_ramps() -> None:
    assert [ramp(p, 0.2, 0.6) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )
    assert ramp(0.0, 0.0, 0.0) == 1.0
    rates = [Qverify(4.0, peak_rate=0.5).rate(p) for p in (0.0, 0.05, 0.5, 1.0)]
    assert rates[0] == pytest.approx(0.05) and rates[1] == pytest.approx(0.5)
    assert rates[1] > rates[2] > rates[3] == pytest.approx(0.0)
    assert [Paper(4.0, peak_rate=1.0).rate(p) for p in (0.0, 0.4, 0.9, 1.0)] == [1.0, 0.3, 0.1, 0.1]


@pytest.mark.parametrize("norm", [False, True])
def test_an_attack_climbs_within_the_ball(norm: bool) -> None:
    network = made(norm)
    pixels, labels = batch()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = attack(network, pixels, labels, 12.0, 8, generator())
    lower, upper = box(pixels, 12.0)
    assert ((lower <= found) & (found <= upper)).all() and not found.requires_grad
    assert network.training
    # Also statistics.
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()
    with torch.no_grad():
        clean, attacked = (
            functional.cross_entropy(network(x).logits, labels) for x in (pixels, found)
        )
    assert attacked > clean + 0.05


def test_the_worst_case_is_the_cross_entropy_of_the_worst_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    margins = logits[:, [0]] - logits
    assert float(worst_case(margins, torch.tensor([0]))) == pytest.approx(
        float(functional.cross_entropy(logits, torch.tensor([0])))
    )


# A box of the whole radius for every image
WHOLE: dict[str, Any] = {"boxed": 1.0, "least": 1.0}


def test_the_ball_grows_past_the_target() -> None:
    pixels, labels = batch()
    recipe = Qverify(10.0, past=1.5, warm=0.1, ramped=0.5, attack_steps=0, **WHOLE)
    for progress, radius in ((0.0, 0.0), (0.1, 0.0), (0.3, 7.5), (0.5, 15.0), (1.0, 15.0)):
        network = Watched(made())
        recipe.loss(network, pixels, labels, progress, generator())  # type: ignore[arg-type]
        point, lower, upper = network.calls[-1]
        assert torch.equal(point, pixels)
        for end, expected in zip((lower, upper), box(pixels, radius), strict=True):
            assert torch.allclose(end, expected)


def test_small_boxes_lie_in_the_ball_around_an_attacked_point() -> None:
    pixels, labels = batch()
    network = Watched(made())
    recipe = Qverify(10.0, mix=0.5, shrink=0.3, attack_steps=3, **WHOLE)
    recipe.loss(network, pixels, labels, 1.0, generator())  # type: ignore[arg-type]
    point, lower, upper = network.calls[-1]
    whole = box(pixels, 10.0)
    assert ((whole[0] <= lower) & (lower <= upper) & (upper <= whole[1])).all()
    inner = (pixels > 20) & (pixels < 235)
    assert torch.allclose((upper - lower)[inner], torch.tensor(6.0))
    middle = (lower + upper)[inner] / 2
    assert ((middle - pixels[inner]).abs() <= 7.0 + 1e-4).all() and (
        (middle - pixels[inner]).abs() > 5
    ).float().mean() > 0.5
    assert not torch.equal(point, pixels)  # the other term is the attacked image's
    with torch.no_grad():
        attacked, clean = (
            functional.cross_entropy(network.network(x).logits, labels) for x in (point, pixels)
        )
    assert attacked > clean


def test_the_whole_ball_lies_around_the_image_itself_whatever_the_attack_found() -> None:
    pixels, labels = batch()
    network = Watched(made())
    Qverify(10.0, attack_steps=1, **WHOLE).loss(network, pixels, labels, 1.0, generator())  # type: ignore[arg-type]
    point, lower, upper = network.calls[-1]
    assert not torch.equal(point, pixels)
    for end, expected in zip((lower, upper), box(pixels, 10.0), strict=True):
        assert torch.equal(end, expected)


def test_only_some_boxes_of_a_batch_are_propagated() -> None:
    pixels, labels = batch()
    network, count = Watched(made()), round(0.25 * len(pixels))
    recipe = Qverify(10.0, mix=0.5, boxed=0.25, least=1.0, attack_steps=0)
    loss = recipe.loss(network, pixels, labels, 1.0, generator())  # type: ignore[arg-type]
    point, lower, _ = network.calls[-1]
    assert len(point) == len(pixels) and len(lower) == count < len(pixels)
    seen = network.network(pixels, *box(pixels[:count], 10.0), labels[:count])
    expected = worst_case(seen.margins, labels[:count]) + functional.cross_entropy(
        seen.logits, labels
    )
    assert float(loss.detach()) == pytest.approx(0.5 * float(expected.detach()))


def test_balls_of_many_radii() -> None:
    torch.manual_seed(1)
    pixels = torch.full((400, 1, 6, 6), 100.0)
    network = Watched(made())
    recipe = Qverify(16.0, mix=0.5, boxed=1.0, least=0.25, attack_steps=0)
    recipe.loss(network, pixels, torch.zeros(400, dtype=torch.int64), 1.0, generator())  # type: ignore[arg-type]
    _, lower, upper = network.calls[-1]
    radii = (upper - lower)[:, 0, 0, 0] / 2
    assert torch.allclose(upper - lower, 2 * radii[:, None, None, None]) and torch.allclose(
        (upper + lower) / 2, pixels
    )
    assert ((radii >= 4) & (radii <= 16)).all()
    assert 0.4 < (radii < 8).float().mean() < 0.6  # the middle on a logarithmic scale


def test_small_boxes_of_some_images_in_balls_of_many_radii() -> None:
    pixels, labels = batch()
    network, count = Watched(made()), round(0.5 * len(pixels))
    recipe = Qverify(10.0, mix=0.5, shrink=0.5, least=0.25, boxed=0.5, attack_steps=2)
    recipe.loss(network, pixels, labels, 1.0, generator())  # type: ignore[arg-type]
    point, lower, upper = network.calls[-1]
    assert len(point) == len(pixels) and len(lower) == len(upper) == count
    ball = (upper - lower).amax((1, 2, 3), keepdim=True)  # twice half of it
    assert ((ball >= 2.5 - 1e-4) & (ball <= 10 + 1e-4)).all() and ball.min() < 6 < ball.max()
    whole = box(pixels[:count], ball + 1e-4)
    assert ((whole[0] <= lower) & (lower <= upper) & (upper <= whole[1])).all()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_mixture(mix: float) -> None:
    pixels, labels = batch()
    network = made().eval()
    loss = Qverify(4.0, mix=mix, attack_steps=0, **WHOLE).loss(
        network, pixels, labels, 1.0, generator()
    )
    seen = network(pixels, *box(pixels, 4.0), labels)
    expected = mix * worst_case(seen.margins, labels) + (1 - mix) * functional.cross_entropy(
        seen.logits, labels
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_the_regularisers_push_where_they_should() -> None:
    """Wide boxes cost; so do layers whose neurons are all active. Balanced, tight layers cost
    nothing."""
    network = made().eval()
    pixels, labels = batch()
    lower, upper = box(pixels, 4.0)

    def cost(width: float) -> float:
        trace: list[Any] = []
        network(None, lower, upper, labels, trace)
        assert len(trace) == 2
        return float(regularisers(trace, width).detach())

    width = float((upper - lower).mean()) / 255
    balanced = cost(1e6 * width)  # as if the input were so wide that the layers were tight
    assert cost(1e-6 * width) > balanced + 0.9
    with torch.no_grad():
        for layer in list(network.layers)[2:-1]:
            layer.bias.fill_(0.7)  # type: ignore[operator]
    assert cost(1e6 * width) > balanced + 0.3
    warm, cold = (
        Qverify(4.0, regularise=r).loss(network, pixels, labels, 0.3, generator()).detach()
        for r in (1.0, 0.0)
    )
    assert float(warm) > float(cold)


def test_the_papers_loss_term_by_term() -> None:
    precision = Precision(fixed_int_bits=2)
    network = made(precision=precision).eval()
    pixels, labels = batch()
    recipe = Paper(4.0, penalty=0.01)
    for progress, part in ((0.0, 0.0), (0.45, 0.5), (0.9, 1.0), (1.0, 1.0)):
        trace: list[Any] = []
        seen = network(pixels, *box(pixels, 4.1 * part), labels, trace)
        right = seen.logits.argmax(1) == labels
        hinge = sum(
            max(0.0, 0.2 - float(seen.margins[i, j].detach()))
            for i in range(COUNT)
            for j in range(3)
            if j != int(labels[i]) and right[i]
        )
        expected = float(functional.cross_entropy(seen.logits, labels).detach())
        expected += part * (0.5 * hinge / 3 / COUNT + 0.01 * float(spreads(trace).sum().detach()))
        assert float(
            recipe.loss(network, pixels, labels, progress, generator()).detach()
        ) == pytest.approx(expected, rel=1e-5)
    assert 0 < int(right.sum()) < COUNT
