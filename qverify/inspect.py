"""`qverify inspect`: what was read, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from qverify.boundary.outputs import make_decoder
from qverify.engine import Engine
from qverify.errors import one_line
from qverify.frontend.encoder import make_encoder
from qverify.frontend.lower import Lowered, codes_of
from qverify.frontend.model import read_model
from qverify.frontend.shapes import shapes_text
from qverify.frontend.tensors import Codes, FloatSum
from qverify.kernels import open_kernels
from qverify.network import Network, Node
from qverify.ops import Conv, Dense, Layout, Max, Mean, Pairwise, Requantize, Softmax, Table
from qverify.ops.columns import Column


def describe(model: str | os.PathLike[str], shapes: Sequence[str] = ()) -> str:
    """The integer network of a model as text: inputs, one line per op with shape, range and
    parameters, outputs, the largest accumulator, and whether an x86 CPU without VNNI could compute
    other integers. `shapes` (NAME=1,3,64,64) fix inputs that the file leaves open. Raises as
    `read_model`."""
    read = read_model(Path(model), shapes)
    lowered = read.lowered
    how = f"the graph that onnxruntime {read.runtime_version} runs for it"
    how += f" with --shape {shapes_text(read.shapes)}" if read.shapes else ""
    compared = read.compared
    net = (
        f"compared: {compared.nodes} nodes, each by itself, with onnxruntime on "
        f"{compared.values:,} values "
        f"({compared.complete} on every code)"
    )
    engine = Engine.make(read, open_kernels("cpu"), backward=False)
    warnings = [*read.warnings, *engine.cross_check()]
    lines = [f"{read.path}  (sha256 {read.sha256[:16]}…)", f"read from: {how}", net]
    lines += [f"fusion: {text}" for text in (engine.written.text,) if text not in warnings]
    lines.append("")
    for name, shape, dtype in lowered.inputs:
        lines.append(f"input   {name}: {dtype}{list(shape)}")
    lines.append(f"        {make_encoder(lowered).size} code variables in [{_range(lowered)}]")
    lines += ["", *_table(lowered.network), ""]
    for name, tensor in lowered.outputs:
        kind = str(tensor.dtype) if isinstance(tensor, Codes) else "float32"
        if isinstance(tensor, FloatSum):
            kind += (
                f", known within {tensor.error.max():.3g} (a float product; near a tie the "
                "runtime is asked)"
            )
        lines.append(
            f"output  {name}: {kind}{list(tensor.shape)}, from value {codes_of(tensor).value}"
        )
    lines += [
        "",
        f"{make_decoder(lowered).size} outputs; {_weights(lowered.network)}",
        *_verdicts(lowered),
    ]
    lines += [f"warning: {w}" for w in warnings]
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """A line of the table, whatever names it holds: as `one_line`, but columns stay where they
    are."""
    return line if line.isprintable() else one_line(line)


def _range(lowered: Lowered) -> str:
    return f"{lowered.network.input_type.low}, {lowered.network.input_type.high}"


def _table(network: Network) -> list[str]:
    rows = [("value", "op", "of", "shape", "range", "detail", "node")]
    for k, node in enumerate(network.nodes):
        t = node.type
        of = ",".join(str(i) for i in node.inputs)
        rows.append(
            (
                str(k + 1),
                type(node.op).__name__,
                of,
                str(list(t.shape)),
                f"{t.low}..{t.high}",
                _detail(node),
                node.name,
            )
        )
    width = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, [*width, 0], strict=True)).rstrip()
        for row in rows
    ]


def _dense(op: Dense) -> str:
    return f"{op.weight.shape[-2]}x{op.weight.shape[-1]}, {_bits(op.weight)}-bit weights"


def _conv(op: Conv) -> str:
    kernel, strides = ("x".join(map(str, sides)) for sides in (op.weight.shape[2:], op.strides))
    groups = f" groups {op.groups}" if op.groups > 1 else ""
    return f"{kernel} stride {strides}{groups}, {_bits(op.weight)}-bit weights"


def _requantize(op: Requantize) -> str:
    factors = [f"{step.kind} {_span(step.operand)}" for step in op.program.steps]
    return ", ".join(factors) + f", zero point {_span(op.zero_point)}"


def _table_op(op: Table) -> str:
    rows, entries = op.values.shape
    return f"{rows} row(s) of {entries}, {'monotone' if op.monotone else 'not monotone'}"


# What the column "detail" says of an op.
DETAILS: Column[Callable[[Any], str]] = Column(
    __name__,
    {
        Dense: _dense,
        Conv: _conv,
        Requantize: _requantize,
        Table: _table_op,
        Pairwise: lambda op: f"{op.values.shape[0]}x{op.values.shape[1]} entries",
        Mean: lambda op: f"float32, {op.order}",
        Softmax: lambda op: f"over {op.length}",
        Layout: lambda op: "reshape" if op.index is None else "gather",
    },
    {Max: "it has no parameters"},
)


def _detail(node: Node) -> str:
    rule = DETAILS.rule(node.op)
    return "" if rule is None else rule(node.op)


def _span(values: npt.NDArray[Any]) -> str:
    low, high = values.min(), values.max()
    return f"{low:.6g}" if low == high else f"{low:.6g}..{high:.6g}"


def _bits(weight: npt.NDArray[Any]) -> int:
    """The width of the narrowest signed integers that hold a layer's weights (less their zero
    points)."""
    return 1 + max(int(weight.max(initial=0)), -1 - int(weight.min(initial=0))).bit_length()


def _weights(network: Network) -> str:
    weights = [node.op.weight for node in network.nodes if isinstance(node.op, Dense | Conv)]
    size = sum(weight.size * _bits(weight) for weight in weights)
    return (
        f"{sum(weight.size for weight in weights):,} weights, {size / 8192:.1f} KiB in the bits "
        "that they need"
    )


def _verdicts(lowered: Lowered) -> list[str]:
    sums = [n for n in lowered.network.nodes if isinstance(n.op, Dense | Conv)]
    reach = max((max(abs(n.type.low), abs(n.type.high)) for n in sums), default=0)
    lines = [
        f"accumulators: at most {reach:,} in magnitude, int32 cannot overflow "
        f"({reach / 2**31:.2%} of its range)"
    ]
    if lowered.saturable:
        lines.append(
            "x86 without VNNI: could saturate at int16 in "
            + ", ".join(f"'{n}'" for n in lowered.saturable)
            + "; the verdict holds for exact int32 accumulation (VNNI, ARM). "
            "Quantize with reduce_range to be safe on both"
        )
    else:
        lines.append("x86 without VNNI: cannot saturate; every CPU computes the same integers")
    return lines
