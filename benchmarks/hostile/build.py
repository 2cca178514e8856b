"""A random hostile network: inputs of every form, a few steps, one or two outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import benchmarks.hostile.qdq  # noqa: F401  (its steps, and those that it imports, register themselves)
from benchmarks.hostile.maker import F32, NAMES, SAMPLES, Impossible, Maker, Value
from benchmarks.hostile.parts import ON_CODES, ON_FLOATS, close, dequantize, layout, quantize
from benchmarks.hostile.parts import clip as clipped

Rng = np.random.Generator
SHAPES: tuple[tuple[int, ...], ...] = (
    *(
        (2,),
        (3,),
        (1, 2),
        (1, 3),
        (1, 4),
        (1, 5),
        (2, 2),
        (1, 1, 3),
        (1, 2, 2),
        (2, 1, 2),
        (1, 1, 5),
    ),
    *(
        (1, 1, 2, 2),
        (1, 2, 1, 2),
        (1, 4, 1, 1),
        (1, 1, 1, 4),
        (1, 2, 2, 1),
        (2, 1, 1, 2),
        (1, 3, 1, 1),
    ),
)


@dataclass
class Network:
    """A network: its maker, outputs, and how wide an input code is, per element."""

    maker: Maker
    outputs: list[Value]
    steps: list[float]

    @property
    def is_float(self) -> list[bool]:
        return [i.dtype == F32 for i in self.maker.inputs for _ in range(i.array.size)]

    def sample(self, k: int) -> list[float]:
        """An input, flat."""
        return [float(v) for i in self.maker.inputs for v in i.samples[k].reshape(-1)]


def random_network(rng: Rng) -> Network:
    """A network that onnxruntime takes node by node."""
    while True:
        maker = Maker(
            rng,
            int(rng.integers(10, 26)),
            style=str(rng.choice(NAMES)),
            dyadic=bool(rng.random() < 0.5),
        )
        steps: list[float] = []
        try:
            value, more = _inputs(maker, steps)
            outputs = _body(maker, value, more)
        except (Impossible, ValueError, IndexError, TypeError, AssertionError, ArithmeticError):
            continue
        return Network(maker, outputs, steps)


def _inputs(m: Maker, steps: list[float]) -> tuple[Value, Value | None]:
    """Codes of the input, and sometimes a second tensor of the same shape: of another input, or
    another quantizer."""
    shape = SHAPES[int(m.rng.integers(len(SHAPES)))]
    while np.prod(shape) > (2 if m.chance(0.1) else 5):
        shape = SHAPES[int(m.rng.integers(len(SHAPES)))]
    second = m.chance(0.15) and np.prod(shape) <= 3
    first = _input(m, shape, steps)
    other = _input(m, shape, steps) if second else None
    if m.chance(0.05) and np.prod(shape) <= 4:
        _unused(m, steps)
    if other is None and first.dtype == F32 and m.chance(0.1):
        return quantize(m, first), quantize(m, first)
    return _codes(m, first, steps), None if other is None else _codes(m, other, steps)


def _input(m: Maker, shape: tuple[int, ...], steps: list[float]) -> Value:
    size = int(np.prod(shape))
    if m.chance(0.15):
        kind = np.dtype(m.pick(np.uint8, np.int8))
        info = np.iinfo(kind)
        samples = [
            m.rng.integers(info.min, info.max + 1, shape).astype(kind) for _ in range(SAMPLES)
        ]
        value = Value(m.name(), samples)
        value.scale, value.zero = (
            np.asarray(m.scale(m.pick(0.05, 0.5, 1.0))),
            np.array(m.rng.integers(info.min, info.max), kind),
        )
        steps += [1.0] * size
    else:
        step = float(m.scale(m.pick(0.004, 0.05, 0.5, 1.0)))
        centre = int(m.rng.integers(-100, 100))
        codes = centre + m.rng.integers(0, m.pick(4, 60, 200), (SAMPLES, *shape))
        samples = [((c + m.rng.uniform(-0.5, 0.5, shape)) * step).astype(F32) for c in codes]
        value = Value(m.name(), samples)
        steps += [step] * size
    m.inputs.append(value)
    return value


def _unused(m: Maker, steps: list[float]) -> None:
    m.inputs.append(
        Value(m.name(), [m.rng.normal(0, 1, (1, 1)).astype(F32) for _ in range(SAMPLES)])
    )
    steps.append(0.5)


def _codes(m: Maker, x: Value, steps: list[float]) -> Value:
    """The input as codes: quantized, perhaps behind a chain of float steps; `steps` are adapted to
    it."""
    if x.dtype != F32:
        return x
    step = steps[0]
    factor = 1.0
    if m.chance(0.3):
        for _ in range(int(m.rng.integers(1, 4))):
            form = m.pick("Sub", "Div", "Mul", "Add", "Clip", "Move")
            if form == "Clip":
                x = clipped(m, x)
            elif form == "Move":
                x = layout(m, x)
            else:
                c = (
                    F32(m.rng.uniform(0.2, 3))
                    if form in ("Div", "Mul")
                    else F32(m.rng.normal(0, 20 * step))
                )
                factor *= {"Div": 1 / float(c), "Mul": float(c)}.get(form, 1.0)
                shape = m.pick((), (1,), x.shape[-1:])
                x = m.node(form, x, m.const(np.full(shape, c, F32)))
    kind = m.pick(np.dtype(np.uint8), np.dtype(np.uint8), np.dtype(np.int8))
    info = np.iinfo(kind)
    scale = F32(step * factor)
    middle = np.rint(float(np.mean([s.mean() for s in x.samples])) / float(scale))
    zero = np.array(np.clip((int(info.min) + int(info.max)) / 2 - middle, info.min, info.max), kind)
    like = Value("", [np.zeros((), kind)], True, np.asarray(scale), zero)
    return quantize(m, x, like=like)


def _body(m: Maker, value: Value, more: Value | None) -> list[Value]:
    made = [value] if more is None else [value, more]
    want, failures = int(m.rng.integers(1, 6)), 0
    if more is not None:
        joined = m.attempt(_joined(more), value)
        if joined is None:
            raise Impossible
        made.append(joined)
    while want > 0:
        x = made[-1] if m.chance(0.9) else made[int(m.rng.integers(len(made)))]
        codes = x.scale is not None and x.dtype.itemsize == 1 and np.asarray(x.scale).ndim == 0
        step = m.pick(*(ON_CODES if codes else ON_FLOATS))
        y = m.attempt(step, x)
        if (
            y is None
            or y.array.size > 24
            or y.constant
            or y.dtype not in (F32, np.dtype(np.uint8), np.dtype(np.int8))
        ):
            failures += 1
            if failures > 40:
                raise Impossible
            continue
        made.append(y)
        want -= 1
    return _outputs(m, made)


def _joined(more: Value) -> Any:
    """Two tensors that become one."""

    def step(m: Maker, x: Value) -> Value:
        a, b = dequantize(m, x), dequantize(m, more)
        form = m.pick("Add", "Mul", "Concat")
        if form == "Concat":
            return close(m, m.node("Concat", a, b, axis=int(m.rng.integers(a.array.ndim))))
        return close(m, m.node(form, a, b))

    return step


def _outputs(m: Maker, made: list[Value]) -> list[Value]:
    last = made[-1]
    if last.array.size > 8:
        last = m.attempt(lambda m, v: _flat(m, v), last) or last
    if last.scale is not None and last.dtype != F32 and m.chance(0.75):
        last = dequantize(m, last)
        if m.chance(0.15):
            last = m.node("Add", last, m.const(m.rng.normal(0, 1, last.shape[-1:]).astype(F32)))
    if last.constant:
        raise Impossible
    outputs = [last]
    earlier = [
        v for v in made[1:-1] if not v.constant and v.array.size <= 8 and v.dtype.itemsize in (1, 4)
    ]
    if earlier and m.chance(0.15):
        other = earlier[int(m.rng.integers(len(earlier)))]
        if other.scale is not None and other.dtype != F32 and m.chance(0.6):
            other = dequantize(m, other)
        if other is not last:
            outputs.insert(int(m.rng.integers(2)), other)
    return outputs


def _flat(m: Maker, x: Value) -> Value:
    """A few elements of a tensor that is too large for a readable property."""
    flat = m.node("Reshape", x, m.ints([1, -1]))
    at = m.rng.permutation(x.array.size)[:4]
    y = m.node("Gather", flat, m.const(at.astype(np.int64)), axis=1)
    y.scale, y.zero = x.scale, x.zero
    return y
