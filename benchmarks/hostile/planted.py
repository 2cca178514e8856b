"""Larger networks with a counterexample that attacks miss: the verdict must never be `unsat`.

    python benchmarks/hostile/planted.py --count 200 --seed 1 [--limit 4] [--out FOLDER]

Each network has 20 to 100 inputs, of which a box leaves 2 to 8 codes each, and a point chosen
first. It counts how many inputs have the point's codes, by tables with a needle, by ramps that
saturate, or by parities, so that gradients are zero or point elsewhere; or it is a random network,
and the point is where no single code raises the output any more. The property holds at the point,
with equality, as onnxruntime computes it. `sat` is checked, `timeout` and `unknown` are counted,
`unsat` is a fault and leaves its files in `FOLDER/INDEX/`. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import numpy.typing as npt

from benchmarks.hostile import oracle
from benchmarks.hostile.maker import F32, MICROSOFT, Impossible, Maker, Value
from benchmarks.hostile.networks import reason_of
from benchmarks.hostile.parts import dequantize
from benchmarks.hostile.properties import decimal
from benchmarks.hostile.qdq import qdq_conv, qdq_product
from benchmarks.hostile.steps import qlinear_conv, qlinear_matmul
from qverify import Options, Verdict, verify
from qverify.errors import QverifyError
from qverify.formats import verdict_text

U8 = np.dtype(np.uint8)
Codes = npt.NDArray[np.int64]
Family = Callable[[Maker, Value, Codes], Value]


def codes(
    m: Maker, op: str, *inputs: Value, scale: float, zero: int, **attributes: object
) -> Value:
    """A node whose last two inputs are the scale and the zero point of its codes."""
    s, z = m.const(np.asarray(scale, F32)), m.const(np.array(zero, np.uint8))
    y = m.node(op, *inputs, s, z, **attributes)
    y.scale, y.zero = s.array, z.array
    return y


def parameters(m: Maker, x: Value) -> list[Value]:
    assert x.scale is not None and x.zero is not None
    return [m.const(np.asarray(x.scale)), m.const(np.asarray(x.zero))]


def counted(m: Maker, misses: Value) -> Value:
    """[1, n] codes that are 0 where an input has the point's code -> [1, 1], the highest code if
    all have.

    In one product, or in groups whose sums are cut at 1, so that further misses change nothing.
    """
    n = misses.shape[1]
    if m.chance(0.5):
        groups = int(m.rng.integers(2, 6))
        weight = np.zeros((n, groups), np.int8)
        weight[np.arange(n), m.rng.integers(0, groups, n)] = 1
        assert misses.scale is not None
        sums = codes(
            m,
            "QLinearMatMul",
            misses,
            *parameters(m, misses),
            *one(m, weight),
            scale=float(misses.scale),
            zero=0,
        )
        misses = m.node(
            "Clip", sums, m.const(np.array(0, np.uint8)), m.const(np.array(1, np.uint8))
        )
        misses.scale, misses.zero = sums.scale, sums.zero
    weight = np.full((misses.shape[1], 1), -1, np.int8)
    assert misses.scale is not None
    step = float(misses.scale) * m.pick(1.0, 0.5, 0.3)
    return codes(
        m,
        "QLinearMatMul",
        misses,
        *parameters(m, misses),
        *one(m, weight),
        scale=step,
        zero=m.pick(255, 100, 7),
    )


def one(m: Maker, weight: npt.NDArray[np.int8]) -> list[Value]:
    """Weights of scale 1."""
    return [m.const(weight), m.const(F32(1)), m.const(np.int8(0))]


def needles(m: Maker, x: Value, star: Codes) -> Value:
    """min(|x - point|, 1), by a table for each input."""
    assert x.scale is not None and x.zero is not None
    at = ((star - int(x.zero)) * float(x.scale)).astype(F32).reshape(x.shape)
    away = m.node("Abs", m.node("Sub", dequantize(m, x), m.const(at)))
    if m.chance(0.5):
        away = m.node("Min", away, m.const(np.asarray(x.scale)))
        return counted(m, codes(m, "QuantizeLinear", away, scale=float(x.scale), zero=0))
    return counted(m, codes(m, "QuantizeLinear", away, scale=float(x.scale) * 1.5, zero=0))


def ramps(m: Maker, x: Value, star: Codes) -> Value:
    """max(x - point, 0) and max(point - x, 0), by a product that saturates."""
    assert x.scale is not None and x.zero is not None
    n = len(star)
    weight = np.concatenate([np.eye(n, dtype=np.int8), -np.eye(n, dtype=np.int8)], axis=1)
    bias = np.concatenate([int(x.zero) - star, star - int(x.zero)]).astype(np.int32)
    s, z = m.const(np.asarray(x.scale)), m.const(np.array(0, np.uint8))
    y = m.node(
        "QGemm", x, *parameters(m, x), *one(m, weight), m.const(bias), s, z, domain=MICROSOFT
    )
    y.scale, y.zero = s.array, z.array
    return counted(m, y)


def parities(m: Maker, x: Value, star: Codes) -> Value:
    """0 where the code is odd as the point's, else 1: a cosine."""
    assert x.scale is not None and x.zero is not None
    turn = m.node("Mul", dequantize(m, x), m.const(F32(np.pi / float(x.scale))))
    sign = np.where((star - int(x.zero)) % 2 == 0, 1, -1).astype(F32).reshape(x.shape)
    wave = m.node("Mul", m.node("Cos", turn), m.const(sign))
    return counted(
        m, codes(m, "QuantizeLinear", m.node("Sub", m.const(F32(1)), wave), scale=2.0, zero=0)
    )


def random_layers(m: Maker, x: Value, star: Codes) -> Value:
    """Two or three layers of all forms."""
    for _ in range(int(m.rng.integers(2, 4))):
        y = None
        while y is None or y.constant or y.array.size > 200 or y.scale is None or y.dtype != U8:
            y = m.attempt(m.pick(qlinear_matmul, qdq_product, qlinear_conv, qdq_conv), x)
        x = y
    return m.node("Flatten", dequantize(m, x)) if x.array.ndim != 2 else dequantize(m, x)


FAMILIES: tuple[Family, ...] = (needles, ramps, parities, random_layers)


class Planted:
    """A network, a box in codes, and the point."""

    def __init__(self, rng: np.random.Generator) -> None:
        m = self.maker = Maker(rng, int(rng.integers(13, 22)))
        n = int(rng.integers(20, 101))
        self.step, self.zero = float(m.pick(0.5, 0.1, 0.0078125, 1.0)), int(rng.integers(0, 256))
        self.low = rng.integers(0, 248, n)
        self.high = np.minimum(self.low + rng.integers(1, 8, n), 255)
        self.star = rng.integers(self.low, self.high + 1)
        samples = [self.floats(rng.integers(self.low, self.high + 1)) for _ in range(4)] + [
            self.floats(self.star)
        ]
        x = Value("x", samples)
        m.inputs.append(x)
        q = codes(m, "QuantizeLinear", x, scale=self.step, zero=self.zero)
        self.family = FAMILIES[int(rng.integers(len(FAMILIES)))]
        score = self.family(m, q, self.star)
        outputs = [dequantize(m, score) if score.scale is not None else score]
        if self.family is not random_layers and m.chance(
            0.5
        ):  # a second score, whose gradient points elsewhere
            weight = rng.integers(-20, 21, (n, 1)).astype(np.int8)
            other = codes(
                m,
                "QLinearMatMul",
                q,
                *parameters(m, q),
                *one(m, weight),
                scale=self.step * 40,
                zero=128,
            )
            outputs.append(dequantize(m, other))
        self.outputs = outputs

    def floats(self, at: Codes) -> npt.NDArray[np.float32]:
        return ((at - self.zero) * self.step).astype(F32).reshape(1, -1)

    def climb(self, run: oracle.Runner, j: int) -> None:
        """Move the point to where no single code raises output j."""
        best = run(self.floats(self.star)[0].tolist())[j]
        for i in self.maker.rng.permutation(len(self.star))[:40]:
            for code in range(self.low[i], self.high[i] + 1):
                before, self.star[i] = self.star[i], code
                now = run(self.floats(self.star)[0].tolist())[j]
                if now > best:
                    best = now
                else:
                    self.star[i] = before

    def spec(self, run: oracle.Runner) -> str:
        """The box, and outputs at least (or at most) what they are at the point."""
        if self.family is random_layers:
            self.climb(run, 0)
        y = run(self.floats(self.star)[0].tolist())
        lines = [f"(declare-const X_{i} Real)" for i in range(len(self.star))]
        lines += [f"(declare-const Y_{j} Real)" for j in range(len(y))]
        # the ends of the box lie a quarter of a code beyond
        for i, (a, b) in enumerate(zip(self.low, self.high, strict=True)):
            ends = [
                Fraction(f"{(c - self.zero + d) * self.step:.9f}")
                for c, d in ((a, -0.25), (b, 0.25))
            ]
            lines += [
                f"(assert (>= X_{i} {decimal(ends[0])}))",
                f"(assert (<= X_{i} {decimal(ends[1])}))",
            ]
        lines.append(f"(assert (>= Y_0 {decimal(Fraction(y[0]))}))")
        if self.family is not random_layers:
            lines += [f"(assert (<= Y_{j} {decimal(Fraction(y[j]))}))" for j in range(1, len(y))]
        return "\n".join(lines) + "\n"


def examine(seed: int, index: int, folder: Path, limit: float) -> tuple[str, str, str]:
    """(family, verdict, fault) of a network, whose files are left in `folder`."""
    rng = np.random.default_rng([seed, index])
    while True:
        try:
            planted = Planted(rng)
            break
        except Impossible:
            continue
    model, spec = folder / "model.onnx", folder / "spec.vnnlib"
    model.write_bytes(planted.maker.model(planted.outputs).SerializeToString())
    run = oracle.Runner(model)
    spec.write_text(planted.spec(run))
    own = oracle.read_spec(spec)
    at = planted.floats(planted.star)[0].tolist()
    assert oracle.unsafe(own, oracle.Point(tuple(map(Fraction, at)), tuple(at)), run(at))[1], (
        "nothing is planted"
    )
    family = planted.family.__name__
    try:
        result = verify(model, spec, Options(timeout=limit, device="cpu", seed=index))
    except QverifyError as error:
        return family, "refused", "" if "Unsupported" in type(error).__name__ else reason_of(error)
    if result.verdict is Verdict.UNSAT:
        return family, "unsat", f"unsat, but the property holds at {at}"
    fault = ""
    if result.verdict is Verdict.SAT:
        fault = oracle.witness_fault(model, own, verdict_text(result).split("\n", 1)[1]) or ""
    return family, result.verdict.value, fault


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="networks that are read")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=4.0, help="seconds for each")
    parser.add_argument("--out", type=Path, default=Path("hostile-planted"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    faults = index = 0
    begin = time.monotonic()
    while (
        sum(n for (_, verdict), n in counts.items() if verdict != "refused") < options.count
        and index < 4 * options.count
    ):
        with tempfile.TemporaryDirectory() as name:
            family, verdict, fault = examine(options.seed, index, Path(name), options.limit)
            if fault:
                faults += 1
                target = options.out / str(index)
                target.mkdir(parents=True, exist_ok=True)
                for path in Path(name).iterdir():
                    (target / path.name).write_bytes(path.read_bytes())
                print(f"{target}: {fault[:300]}", flush=True)
        counts[family, verdict] += 1
        index += 1
        if index % 20 == 0:
            print(
                f"{index} networks, {faults} faults: "
                + ", ".join(f"{n} {f} {v}" for (f, v), n in sorted(counts.items())),
                flush=True,
            )
    for (family, verdict), n in sorted(counts.items()):
        print(f"{n:6d} {family}: {verdict}")
    print(f"{faults} faults in {index} networks, {time.monotonic() - begin:.0f} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
