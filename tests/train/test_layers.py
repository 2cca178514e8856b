"""The training graph: what it computes is what the exported file computes, and its gradients are
the smooth graph's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from qverify.errors import QverifyError  # noqa: E402
from qverify.frontend.model import read_model  # noqa: E402
from qverify.kernels import open_kernels  # noqa: E402
from qverify.ops import Dense, Requantize  # noqa: E402
from qverify.train import export  # noqa: E402
from qverify.train.codes import SCALE_KINDS, ActivationCodes, ActivationQuantizer, exact, unrounded  # noqa: E402
from qverify.train.config import FORMATS  # noqa: E402
from qverify.train.layers import (  # noqa: E402
    Affine,
    AveragePool,
    ConvLayer,
    DenseLayer,
    Flatten,
    Input,
    Logits,
    MaxPool,
    QuantizedNetwork,
    Residual,
)
from qverify.train.models import MODELS, Precision, make_model  # noqa: E402
from qverify.train.recipes import box  # noqa: E402

CPU = open_kernels("cpu")


def plain(bits: int, **options: Any) -> QuantizedNetwork:
    def q() -> ActivationQuantizer:
        return ActivationQuantizer(bits, scale=options.get("scale", "learned"))

    return QuantizedNetwork(
        Input(bits),
        ConvLayer(2, 6, 3, stride=2, padding=1, quantizer=q(), norm=True, weight_bits=bits),
        ConvLayer(6, 8, 3, padding=1, groups=2, quantizer=q(), per_channel=False),
        MaxPool(2),
        Flatten(),
        DenseLayer(32, 12, quantizer=q(), norm=True, weight_bits=bits),
        DenseLayer(12, 9, quantizer=q(), weight_scale=options.get("scale", "range")),
        Logits(9, 4, weight_bits=bits),
        shape=(2, 8, 8),
    )


def residual(bits: int, **options: Any) -> QuantizedNetwork:
    scale = options.get("scale", "learned")

    def q(relu: bool = False, symmetric: bool = True) -> ActivationQuantizer:
        return ActivationQuantizer(bits, relu, scale, symmetric)

    first = nn.Sequential(
        ConvLayer(5, 5, 3, padding=1, quantizer=q(True)),
        ConvLayer(5, 5, 3, padding=1, quantizer=q()),
    )
    second = nn.Sequential(ConvLayer(5, 6, 3, stride=2, padding=1, quantizer=q(symmetric=False)))
    return QuantizedNetwork(
        Input(8),
        ConvLayer(2, 5, 3, padding=1, quantizer=q(symmetric=False)),
        Residual(first, None, q(True)),
        Residual(second, ConvLayer(5, 6, 1, stride=2, quantizer=q()), q(True)),
        AveragePool(2),
        Flatten(),
        Logits(24, 4),
        shape=(2, 8, 8),
    )


NETWORKS = {"plain": plain, "residual": residual}


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 8, 8)).astype(np.uint8)


def made(name: str, bits: int, seed: int = 0, **options: Any) -> Any:
    """A network with random weights and biases whose scales have seen data."""
    torch.manual_seed(seed)
    network = NETWORKS[name](bits, **options)
    with torch.no_grad():
        for part in network.parameters():
            if part.ndim == 1:
                part.add_(0.05 * torch.randn_like(part))
        for layer in network.modules():
            if isinstance(layer, Affine) and layer.norm:
                layer.gain[::2] *= -1
    x = torch.from_numpy(pixels(40, seed + 1)).float()
    network(x, *box(x, 6.0), torch.zeros(40, dtype=torch.long))
    return network.eval()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_equals_the_training_graph(
    name: str, bits: int, form: Any, tmp_path: Path
) -> None:
    """In onnxruntime, bit for bit, and in the verifier's reading: points, intervals of every layer,
    and margins."""
    network = made(name, bits)
    path = tmp_path / "model.onnx"
    export.export(network, path, form, {"made by": "a test"})
    images = pixels(300, 7)
    assert export.check(network, path, images) == 300
    # Not a constant function.
    assert len(np.unique(export.evaluate(network, images))) > (50, 10, 2)[(8, 4, 2).index(bits)]

    integers = read_model(path).lowered.network
    x = torch.from_numpy(images[:50]).float()
    labels = torch.arange(50) % 4
    trace: list[Any] = []
    with torch.no_grad(), exact():
        codes = [
            network.layers[0].codes(end).flatten(1).numpy().astype(np.int32) for end in box(x, 20.0)
        ]
        body = network.body(None, *box(x, 20.0), trace)
        margins, _ = network.head.margins(body, labels)
    boxes, _ = integers.boxes(CPU, *codes)
    hidden = [k for k, node in enumerate(integers.nodes, 1) if isinstance(node.op, Requantize)]
    assert hidden and isinstance(integers.nodes[-1].op, Dense)
    last = integers.nodes[-1].inputs[0]
    assert np.array_equal(boxes[last][0].reshape(50, -1), body.lower.flatten(1).numpy())
    assert np.array_equal(boxes[last][1].reshape(50, -1), body.upper.flatten(1).numpy())
    op = integers.nodes[-1].op
    lower, upper = (end.reshape(50, -1).astype(np.int64) for end in boxes[last])
    for image in range(50):
        apart = op.weight[:, [int(labels[image])]] - op.weight
        constant = op.bias.reshape(-1)[int(labels[image])] - op.bias.reshape(-1)
        least = (
            np.maximum(apart, 0).T @ lower[image] + np.minimum(apart, 0).T @ upper[image] + constant
        )
        assert np.array_equal(least, margins[image].numpy())
    assert float((body.upper - body.lower).mean()) > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_training_computes_the_same_bounds(bits: int) -> None:
    """Float32, as the loss sees it, and exact: the same codes and margins, where sums are small."""
    network = made("plain", bits).train()
    for layer in network.modules():
        if hasattr(layer, "frozen"):
            layer.frozen = True
    x = torch.from_numpy(pixels(60, 9)).float()
    labels = torch.arange(60) % 4
    trained = network.body(x, *box(x, 3.0))
    margins, _ = network.head.margins(trained, labels)
    network.eval()
    with torch.no_grad(), exact():
        true = network.body(x, *box(x, 3.0))
        expected, _ = network.head.margins(true, labels)
    for name in ("point", "lower", "upper"):
        assert torch.equal(getattr(trained, name).double(), getattr(true, name).double())
    assert torch.equal(margins.double(), expected)


def test_statistics_follow_the_batches() -> None:
    """A norm's running mean and variance approach the batches' own, and `frozen` uses them."""
    torch.manual_seed(0)
    layer = ConvLayer(1, 3, 3, norm=True)
    network = QuantizedNetwork(Input(), layer, Flatten(), Logits(3 * 36, 2), shape=(1, 8, 8))
    x = torch.from_numpy(pixels(64, 1)[:, :1]).float()
    for _ in range(80):
        network(x)
    with torch.no_grad():
        step = layer.weight.abs().amax((1, 2, 3), keepdim=True) / 127
        sums = torch.conv2d(x, torch.round(layer.weight / step) * step) / 255
    assert torch.allclose(layer.mean, sums.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(layer.variance, sums.var((0, 2, 3), correction=0), rtol=1e-2)
    trained = network(x).logits
    network.eval()
    assert torch.allclose(network(x).logits, trained, atol=0.1)
    with torch.no_grad():
        layer.bias.add_(1.0)
        layer.gain.copy_(torch.tensor([-2.0, 1.0, 0.5]))
        weight, biases, step, scale, point = layer.quantized(network.layers[0](x, None, None))
    factor = layer.gain.detach() / (layer.variance + 1e-5).sqrt()
    assert point is None  # only a batch's statistics need the sums
    assert torch.allclose(biases * scale, 1.0 - layer.mean * factor, atol=1e-4)
    real = layer.weight.detach() * factor[:, None, None, None]
    assert torch.allclose(
        weight * step[:, None, None, None], real, atol=float(real.abs().max()) / 250
    )


@pytest.mark.parametrize("inside_exact", [False, True])
def test_the_sums_that_are_normalised_are_those_of_the_integer_network(inside_exact: bool) -> None:
    network = made("plain", 8).train()
    x = network.layers[0](torch.from_numpy(pixels(30, 3)).float(), None, None)
    layer = network.layers[1]
    with torch.no_grad(), exact() if inside_exact else contextlib.nullcontext():
        weight, bias, _, scale, point = layer.quantized(x)
        assert point is not None and torch.equal(
            point, layer.sums(x.point - x.zero_point, weight, bias)
        )
        real = (point * scale[:, None, None]).transpose(0, 1).flatten(1).float()
    assert torch.allclose(real.mean(1), layer.bias, atol=0.02)
    assert torch.allclose(real.std(1), layer.gain.abs(), rtol=0.02)


def test_normalisation_needs_a_step_for_each_channel() -> None:
    for options in ({"per_channel": False}, {"weight_scale": "power-of-two"}):
        with pytest.raises(ValueError, match="normalisation needs a weight scale per channel"):
            ConvLayer(1, 3, 3, norm=True, **options)


def test_ranges_are_averages_and_zero_points_follow() -> None:
    quantizer = ActivationQuantizer(8, relu=False, scale="range", symmetric=False)
    quantizer.observe(torch.tensor([0.0, 1.0]))
    assert int(quantizer.zero) == 0 and float(quantizer.scale().detach()) == pytest.approx(1 / 255)
    for _ in range(200):
        quantizer.observe(torch.tensor([-1.0, 1.0]))
    assert int(quantizer.zero) in (127, 128) and float(quantizer.scale()) == pytest.approx(
        2 / 255, rel=1e-3
    )
    relu = ActivationQuantizer(8, scale="range")
    for most in (1.0, 2.0):
        relu.observe(torch.tensor([-3.0, most]))
    assert 1 / 255 < float(relu.scale()) < 1.1 / 255
    learned = ActivationQuantizer(8)
    # The highest twentieth is clipped.
    learned.observe(torch.linspace(-1.0, 1.0, 2001), torch.tensor([50.0]))
    assert float(learned.scale().detach()) == pytest.approx(0.9 / 255, rel=0.01)
    rare = ActivationQuantizer(8)
    # Less than a twentieth is active.
    rare.observe(torch.cat([torch.full((97,), -10.0), torch.tensor([0.1, 0.5, 0.2])]))
    assert float(rare.scale().detach()) == pytest.approx(0.5 / 255)
    dead = ActivationQuantizer(8)
    dead.observe(torch.tensor([-0.5, -3.0]))
    # Not a step that nothing could leave.
    assert float(dead.scale().detach()) == pytest.approx(3 / 255)


def test_fixed_point_biases_are_rounded() -> None:
    torch.manual_seed(0)
    layer = DenseLayer(
        6, 5, weight_scale="fixed", weight_step=2.0**-7, per_channel=False, bias_bits=8
    )
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.9, -0.31, 0.007, 0.0, 0.123]))
    _, bias, _, scale, _ = layer.quantized(
        ActivationCodes(None, None, None, torch.tensor(1 / 255), 0, 255)
    )
    real = bias * scale
    assert (
        real / 2.0**-7 - torch.round(real / 2.0**-7)
    ).abs().max() < 0.02  # 0.9 fits 127 steps of 2**-7
    assert (real - layer.bias).abs().max() <= 2.0**-8 + 1e-3


def test_sums_that_leave_int32_are_refused(tmp_path: Path) -> None:
    for weight, bias in ((1e-12, 0.5), (0.0, 1e30)):
        network = made("plain", 8)
        with torch.no_grad():
            network.head.weight.fill_(weight)
            network.head.bias.fill_(bias)
        with pytest.raises(QverifyError, match="do not fit int32"):
            export.export(network, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())


def test_a_residual_sum_of_dense_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = DenseLayer(12, 12, ActivationQuantizer(relu=False))
    network = QuantizedNetwork(
        Input(), Flatten(), DenseLayer(16, 12), Residual(body), Logits(12, 3), shape=(1, 4, 4)
    )
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4)).astype(np.uint8)
    network(torch.from_numpy(images).float())
    for form in FORMATS:
        export.export(network, tmp_path / "model.onnx", form)  # type: ignore[arg-type]
        assert export.check(network, tmp_path / "model.onnx", images) == 50


def test_a_difference_is_found(tmp_path: Path) -> None:
    network = made("plain", 8)
    path = tmp_path / "model.onnx"
    export.export(network, path)
    with torch.no_grad():
        network.head.bias[2] += 0.5
    with pytest.raises(QverifyError, match="differ on image 0"):
        export.check(network, path, pixels(20))


def test_the_export_names_a_foreign_module() -> None:
    network = made("plain", 8)
    network.layers[3] = nn.MaxPool2d(2)
    with pytest.raises(QverifyError, match="a MaxPool2d cannot be exported"):
        export.export(network, "never.onnx")


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_hold(name: str, bits: int) -> None:
    """Points of the box lie within the bounds of every code and margin."""
    network = made(name, bits)
    x = torch.from_numpy(pixels(20, 3)).float()
    labels = torch.arange(20) % 4
    lower, upper = box(x, 5.0)
    with torch.no_grad(), exact():
        bounds = network.body(None, lower, upper)
        margins = network(None, lower, upper, labels).margins
        for seed in range(20):
            part = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
            inside = torch.lerp(lower, upper, part).round()
            codes = network.body(inside, None, None).point
            assert ((bounds.lower <= codes) & (codes <= bounds.upper)).all()
            logits = network(inside).logits
            true = logits.gather(1, labels[:, None]) - logits
            assert (true >= margins - 1e-3 * margins.abs().max()).all()
    rows = torch.arange(20)
    assert (margins[rows, labels] == 0).all()


@pytest.mark.parametrize("scale", SCALE_KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_unrounded_graph(name: str, scale: Any) -> None:
    """Straight-through gradients of every parameter, by central differences of the graph without
    rounding."""
    network = made(name, 8, scale=scale).double()
    x = torch.from_numpy(pixels(6, 11)).double()
    labels = torch.arange(6) % 4
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value() -> Any:
        seen = network(x, *box(x, 4.0), labels)
        return (seen.logits * weights).sum() + (seen.margins * weights).sum()

    with unrounded():
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
        checked = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None
            for flat in range(0, parameter.numel(), max(1, parameter.numel() // 3)):
                held = parameter.data.view(-1)[flat].item()
                sides = []
                for step in (1e-6, -1e-6, 2e-6, -2e-6):
                    parameter.data.view(-1)[flat] = held + step
                    with torch.no_grad():
                        sides.append(float(value()))
                parameter.data.view(-1)[flat] = held
                slope, wider = (sides[0] - sides[1]) / 2e-6, (sides[2] - sides[3]) / 4e-6
                tolerance = 1e-4 * max(1.0, abs(slope), float(gradient.abs().max()))
                if abs(slope - wider) > tolerance / 10:
                    continue  # a clip, a pooling tie or a weight's sign lies in between
                if covers(network, parameter, flat):
                    # the step size follows the largest weight, as a constant for the gradient
                    continue
                assert float(gradient.view(-1)[flat]) == pytest.approx(slope, abs=tolerance)
                checked += 1
        assert checked > 20


def covers(network: Any, parameter: Any, flat: int) -> bool:
    """Whether the `range` step follows this weight, the largest of its channel or tensor."""
    for layer in network.modules():
        if getattr(layer, "weight", None) is parameter and layer.weight_scale.kind == "range":
            size = layer.weight.detach().abs()
            groups = size.flatten(1) if layer.weight_scale.log2.ndim else size.reshape(1, -1)
            row, column = divmod(flat, groups.shape[1])
            return bool(groups[row, column] == groups[row].max())
    return False


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_built_exported_and_read(model: str, norm: bool, tmp_path: Path) -> None:
    shape = (3, 32, 32) if model == "paper-cifar" else (1, 28, 28)
    network: Any = make_model(model, shape, 10, Precision(), norm)
    if sum(p.numel() for p in network.parameters()) > 1_000_000:
        pytest.skip("as the others, but large")
    network(
        torch.zeros(2, *shape), *box(torch.zeros(2, *shape), 1.0), torch.zeros(2, dtype=torch.long)
    )
    path = tmp_path / "model.onnx"
    export.export(network, path)
    images = np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(np.uint8)
    assert export.check(network, path, images) == 4
    assert {entry.key for entry in onnx.load(path).metadata_props} == set()


def test_precision_for_each_layer() -> None:
    network: Any = make_model("mlp", (1, 4, 4), 3, Precision((8, 4, 6), (5, 3)))
    layers = list(network.layers)[2:]
    assert [layer.weight_bits for layer in layers] == [8, 4, 6]
    assert [layer.quantizer.bits for layer in layers[:-1]] == [5, 3]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (Precision((8, 8)), "2 weight bits are given for 3"),
        (Precision((8,) * 4), "4 weight bits are given for 3"),
        (Precision((8,), (8,) * 4), "4 activation bits are given for 3"),
        (Precision((9,)), "9 bits are not supported"),
        (Precision((8,), (1,)), "1 bits are not supported"),
        (Precision(input_bits=16), "16 bits are not supported"),
    ],
)
def test_a_precision_that_does_not_fit(precision: Precision, message: str) -> None:
    with pytest.raises(QverifyError, match=message):
        make_model("mlp", (1, 4, 4), 3, precision)
