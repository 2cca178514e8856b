"""How an ONNX spelling becomes integer ops: rules by op name, each reading one node through a `View` of it."""

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

Rule = Callable[["View"], "Tensor | tuple[Tensor, ...]"]

MICROSOFT = "com.microsoft"
MAX_ELEMENTS = 2**27  # of one tensor
RULES: dict[tuple[str, str], Rule] = {}


def lowers(*names: str, domains: tuple[str, ...] = ("",)) -> Callable[[Rule], Rule]:
    """Register a rule for op names in the given domains ("" is the ONNX standard's)."""

    def register(rule: Rule) -> Rule:
        for domain in domains:
            for name in names:
                assert (domain, name) not in RULES, f"two rules for {domain}::{name}"
                RULES[domain, name] = rule
        return rule

    return register


@dataclass
class View:
    """One node as a rule sees it. `inputs` are tensors, None where an optional input is absent."""

    node: onnx.NodeProto
    inputs: list[Tensor | None]
    builder: Builder
    opset: int  # of the node's domain
    opsets: list[onnx.OperatorSetIdProto]  # of the file

    @property
    def op(self) -> str:
        return self.node.op_type

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value (strings decoded), or the default."""
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
            raise Refusal(f"{what} is not positive ({value.min()}): the file is broken, export it again")
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
    """A per-axis parameter [C] shaped to broadcast along `axis` of a rank-`rank` tensor; one element becomes []."""
    if value.size == 1:
        return value.reshape(())
    if value.ndim != 1:
        raise Refusal(f"a parameter of shape {list(value.shape)} (blocked quantization) is not supported")
    shape = [1] * rank
    shape[checked_axis(axis, rank)] = len(value)
    return value.reshape(shape)
