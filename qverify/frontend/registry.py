"""How an ONNX spelling becomes integer ops: rules by op name, each reading one node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qverify.frontend.builder import Builder, Refusal
from qverify.frontend.tensors import Codes, Float, Tensor

Function = Callable[["View"], "Tensor | tuple[Tensor, ...]"]

MICROSOFT = "com.microsoft"
MAX_ELEMENTS = 2**27  # of one tensor
ANY = 2**31  # inputs: any number of them

# Ops that draw random numbers. Dropout does in training mode.
RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
RANDOM |= {"BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", "Sampling"}  # Microsoft's
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


@dataclass(frozen=True)
class Rule:
    """How nodes of one op are read, and all that `function` understands of such a node.

    A node with any other attribute or a further input is refused by name (`refuse_unknown`), and so
    is one with more outputs than the function gives: a rule speaks for no more than it declares.
    """

    function: Function
    # None: all, since the node is run by onnxruntime as it stands.
    attributes: frozenset[str] | None
    inputs: int  # at most so many


RULES: dict[tuple[str, str], Rule] = {}


def lowers(
    *names: str, inputs: int, attributes: str | None = "", domains: tuple[str, ...] = ("",)
) -> Callable[[Function], Function]:
    """Register a rule for op names in the given domains ("" is the ONNX standard's).

    It reads `inputs` inputs and understands the `attributes` named, separated by spaces (None: all
    of them).
    """
    understood = None if attributes is None else frozenset(attributes.split())

    def register(function: Function) -> Function:
        for domain in domains:
            for name in names:
                assert (domain, name) not in RULES, f"two rules for {domain}::{name}"
                RULES[domain, name] = Rule(function, understood, inputs)
        return function

    return register


def refuse_unknown(node: onnx.NodeProto, rule: Rule, domain: str, opset: int) -> None:
    """Refuse a node that says more than its rule understands.

    An attribute that spells out its schema's default says nothing; exporters, and onnxruntime
    itself, write such ones.
    """
    for attribute in node.attribute:
        known = rule.attributes is None or attribute.name in rule.attributes
        if not known and not _is_default(attribute, node.op_type, domain, opset):
            raise Refusal(f"its attribute '{attribute.name}' is not supported ({_text(attribute)})")
    for k, name in enumerate(node.input[rule.inputs :], rule.inputs):
        if name:
            raise Refusal(f"its input {k} ('{name}') is not supported")


def _is_default(attribute: onnx.AttributeProto, op: str, domain: str, opset: int) -> bool:
    try:
        declared = onnx.defs.get_schema(op, opset, domain).attributes[attribute.name].default_value
    except (onnx.defs.SchemaError, KeyError):  # Microsoft's ops are not in onnx's registry
        return False
    if not declared.type or declared.type != attribute.type or attribute.ref_attr_name:
        return False
    return bool(
        onnx.helper.get_attribute_value(declared) == onnx.helper.get_attribute_value(attribute)
    )


def _text(attribute: onnx.AttributeProto) -> str:
    kinds = onnx.AttributeProto
    if attribute.type in (
        kinds.FLOAT,
        kinds.INT,
        kinds.STRING,
        kinds.FLOATS,
        kinds.INTS,
        kinds.STRINGS,
    ):
        value = onnx.helper.get_attribute_value(attribute)
        return repr(value.decode(errors="replace") if isinstance(value, bytes) else value)[:40]
    return str(kinds.AttributeType.Name(attribute.type)).lower()


@dataclass
class View:
    """One node as a rule sees it. `inputs` are tensors, None where an optional input is absent."""

    node: onnx.NodeProto
    inputs: list[Tensor | None]
    builder: Builder
    opset: int  # of the node's domain
    opsets: list[onnx.OperatorSetIdProto]  # of the file
    attributes: frozenset[str] | None  # that the rule declares

    @property
    def op(self) -> str:
        return self.node.op_type

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value (strings decoded), or the default.

        The rule must have declared it.
        """
        assert self.attributes is None or name in self.attributes, (
            f"the rule for {self.op} does not declare the attribute '{name}'"
        )
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def has(self, k: int) -> bool:
        return k < len(self.inputs) and self.inputs[k] is not None

    def tensor(self, k: int) -> Tensor:
        """Input k, which must be present."""
        if not self.has(k):
            raise Refusal(f"input {k} is missing")
        value = self.inputs[k]
        assert value is not None
        return value

    def constant(self, k: int, what: str) -> npt.NDArray[Any]:
        """Input k, which must be a constant."""
        value = self.tensor(k)
        if not isinstance(value, np.ndarray):
            raise Refusal(f"{what} (input {k}) must be a constant")
        return value

    def codes(self, k: int) -> Codes:
        """Input k, which must be an integer value of the network."""
        value = self.tensor(k)
        if not isinstance(value, Codes):
            kind = "a constant" if isinstance(value, np.ndarray) else "a float tensor"
            raise Refusal(f"input {k} must be integer codes, but is {kind}")
        return value

    def floats(self, k: int) -> Float:
        """Input k, which must be a float tensor that depends on the input."""
        value = self.tensor(k)
        if isinstance(value, Codes | np.ndarray):
            raise Refusal(f"input {k} must be a float tensor")
        return value

    def scale(self, k: int, what: str) -> npt.NDArray[np.float32]:
        """A scale: a constant float32, finite and positive."""
        value = self.constant(k, what)
        if value.dtype != np.float32:
            raise Refusal(f"{what} is {value.dtype}; only float32 scales are supported")
        if not np.isfinite(value).all():
            raise Refusal(f"{what} is NaN or infinite: the file is broken, export it again")
        if (value <= 0).any():
            raise Refusal(
                f"{what} is not positive ({value.min()}): the file is broken, export it again"
            )
        return value

    def zero_point(self, k: int, dtype: npt.DTypeLike) -> npt.NDArray[np.int32]:
        """A zero point of the codes' dtype, int32; zero where the input is absent."""
        if not self.has(k):
            return np.zeros((), np.int32)
        value = self.constant(k, "the zero point")
        if value.dtype != np.dtype(dtype):
            raise Refusal(f"the zero point is {value.dtype}, its codes are {np.dtype(dtype)}")
        return value.astype(np.int32)


def scalar(value: npt.NDArray[Any], what: str) -> Any:
    """The one element of a constant; ONNX writes scalars as [] or [1]."""
    if value.size != 1:
        raise Refusal(f"{what} has {value.size} elements where one is expected")
    return value.reshape(-1)[0]


def checked_axis(axis: Any, rank: int) -> int:
    """An axis, counted from the front; it must be one of the tensor's."""
    if not isinstance(axis, int) or not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside a rank-{rank} tensor")
    return axis % rank


def checked_size(shape: Iterable[int]) -> None:
    """Refuse shapes that no real layer has, before an array of that size is made."""
    size = prod(int(n) for n in shape)
    if size > MAX_ELEMENTS:
        raise Refusal(f"a result of {size} elements is not supported (at most {MAX_ELEMENTS} are)")


def along(value: npt.NDArray[Any], axis: int, rank: int) -> npt.NDArray[Any]:
    """A per-axis parameter [C] shaped to broadcast along `axis` of a rank-`rank` tensor.

    One element becomes [].
    """
    if value.size == 1:
        return value.reshape(())
    if value.ndim != 1:
        raise Refusal(
            f"a parameter of shape {list(value.shape)} (blocked quantization) is not supported"
        )
    shape = [1] * rank
    shape[checked_axis(axis, rank)] = len(value)
    return value.reshape(shape)
