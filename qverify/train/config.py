"""What a training run is asked for: settings with their limits, as TOML and as options.

PyTorch is not needed here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qverify.errors import UsageError

RECIPES = ("qverify", "paper")
AUGMENTS = ("none", "shift", "flip", "shift-flip")
SCALES = ("learned", "power-of-two", "range")
FORMATS = ("qoperator", "qdq")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Config:
    """All that a run depends on. `eps` is in pixels; `rate` 0 means the recipe's own.

    The training images' last `held_out` (0: a tenth, at most 5000) are not trained on: the log's
    accuracies are theirs. Images sorted by class are shuffled before. `past`, `mix`, `shrink`,
    `boxed`, `least`, `attack_steps` and `regularise` are the recipe `qverify`'s (see
    `recipes.Qverify`), and so are `norm` (see `layers.Affine`) and the scales: the recipe `paper`
    has none, and fixed ones. `threads` 0 means PyTorch's choice. `start_from` names another run's
    checkpoint, whose network is trained on: eps is whole from the first step, and layers with other
    bits cover the same ranges.
    """

    data: str
    model: str = "small"
    recipe: str = "qverify"
    eps: float = 4.0
    epochs: int = 30
    batch: int = 128
    rate: float = 0.0
    seed: int = 0
    held_out: int = 0
    augment: str = "shift"
    mix: float = 0.1
    shrink: float = 1.0
    boxed: float = 0.25
    least: float = 0.25
    past: float = 1.0
    attack_steps: int = 1
    regularise: float = 0.0
    weight_bits: tuple[int, ...] = (8,)
    activation_bits: tuple[int, ...] = (8,)
    input_bits: int = 8
    per_channel: bool = True
    weight_scale: str = "range"
    activation_scale: str = "learned"
    symmetric: bool = True
    norm: bool = True
    format: str = "qoperator"
    device: str = "auto"
    threads: int = 1
    start_from: str = ""

    def __post_init__(self) -> None:
        _one_of("recipe", self.recipe, RECIPES)
        _one_of("augment", self.augment, AUGMENTS)
        _one_of("format", self.format, FORMATS)
        _one_of("device", self.device, DEVICES)
        _one_of("weight_scale", self.weight_scale, SCALES)
        _one_of("activation_scale", self.activation_scale, SCALES)
        for name in ("data", "start_from"):  # as text, the same wherever the command is given
            object.__setattr__(
                self, name, getattr(self, name) and os.path.abspath(getattr(self, name))
            )
        least = {"epochs": 1, "batch": 1, "held_out": 0, "seed": 0, "threads": 0, "attack_steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}")
        most = {"seed": 2**40, "eps": 255.0, "past": 10.0, "regularise": 100.0, "rate": 10.0}
        most |= dict.fromkeys(("mix", "shrink", "boxed", "least"), 1.0)
        for name, high in most.items():
            if not 0 <= getattr(self, name) <= high:
                raise UsageError(f"{name} must lie between 0 and {high:g}")
        if 0 < self.eps < 0.5:
            raise UsageError(
                f"eps = {self.eps:g} is in pixels, from 0 to 255: is {255 * self.eps:.4g} meant?"
            )
        for name in ("least", "boxed"):
            if not getattr(self, name):
                raise UsageError(f"{name} must be above 0")
        free = self.per_channel and self.weight_scale != "power-of-two"
        if self.norm and not free and self.recipe == "qverify":
            raise UsageError(
                "norm needs a weight scale for each channel that is not a power of two: set norm "
                "= false for others"
            )
        if self.shrink < 1 and not self.attack_steps and self.recipe == "qverify":
            raise UsageError(
                "a box with shrink < 1 lies around an attacked point: set attack_steps to 1 or more"
            )

    def text(self) -> str:
        """The configuration as TOML."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                shown = str(value).lower()
            elif isinstance(value, tuple):
                shown = str(list(value))
            elif isinstance(value, str):
                shown = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            else:
                shown = repr(value)
            lines.append(f"{field.name} = {shown}\n")
        return "".join(lines)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"no {name} '{value}': use one of {', '.join(choices)}")


def read_config(path: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> Config:
    """The configuration of a TOML file with the keys of `Config`, with what is `given` instead.

    UsageError for others.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not a TOML file: {error}") from error
    kinds = {field.name: field for field in fields(Config)}
    for name in values:
        if name not in kinds:
            raise UsageError(f"{path}: no setting '{name}'; there are {', '.join(kinds)}")
    values |= given
    if "data" not in values:
        raise UsageError(
            "the data set is missing: name it on the command line or as `data` in the configuration"
        )
    for name, value in values.items():
        values[name] = _converted(name, value, kinds[name])
    return Config(**values)


def _converted(name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    default = "" if name == "data" else field.default
    if isinstance(default, tuple):
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            return tuple(value)
        raise UsageError(f"{name} must be a whole number or a list of them")
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[
            type(default)
        ]
        raise UsageError(f"{name} must be {kind}")
    return value
