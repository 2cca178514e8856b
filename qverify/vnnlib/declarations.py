"""What a VNN-LIB file declares: its version, its variables, and the meaning of every operand.

References as in `reader.py`, which hands in top-level forms and words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain, product
from typing import Final

from qverify.property import Variable
from qverify.vnnlib.constraints import Fault, number, quote

MAX_ELEMENTS: Final = 4_000_000  # of all 2.x tensors: a shape is believed before anything bounds it
# Distinct numbers; all those of a large file would cost more than they save.
MAX_REMEMBERED: Final = 65_536
_VERSION: Final = re.compile(r"\(\s*vnnlib-version\s+<(2\.[0-9]{1,3})>\s*\)")
_FLAT: Final = re.compile(
    r"\(\s*declare-(?:const|fun)\s+(([XY])_(0|[1-9][0-9]{0,17})|[^\s()]+)(?:\s+|\s*\(\s*\)\s*)([^\s()]+)\s*\)"
)
_NETWORK: Final = re.compile(r"\(\s*declare-network\s+[A-Za-z]\w*\s*(?:\([^()]*\)\s*)*\)", re.ASCII)
_TENSOR: Final = re.compile(
    r"\(\s*declare-(input|output)\s+([A-Za-z]\w*)\s+([A-Za-z]\w*)\s*\[\s*((?:\d{1,18}\s*(?:,\s*\d{1,18}\s*)*)?)\]\s*\)",
    re.ASCII,
)
_IGNORED: Final = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"}


class Names:
    """What is declared: the version, the variables, and the meaning of an operand."""

    def __init__(self) -> None:
        self.version = ""
        self.sizes = {"input": 0, "output": 0}  # elements
        # In 1.0: one each, once complete.
        self._variables: dict[str, list[Variable]] = {
            "input": [],
            "output": [],
        }
        self._tensors: set[str] = set()  # their names
        self._sorts: dict[str, str] = {}  # 1.0: of "input" and "output"
        self._keys: dict[str, int] = {}  # "X_3", "X[0,3]": every element, for speed
        self._numbers: dict[str, Fraction] = {}

    def command(self, head: str, form: str, pos: int) -> None:
        """Obey a top-level form that is not an assert and whose comments are blanked; it begins at
        `pos`."""
        if head == "vnnlib-version":
            match = _VERSION.fullmatch(form)
            if match is None or self.version:
                raise Fault("expected one (vnnlib-version <2.0>), or 2.x, as the first form", pos)
            self.version = match.group(1)
            return
        self.version = self.version or "1.0"
        if head in ("declare-const", "declare-fun"):
            self._declare_flat(form, pos)
        elif head == "declare-network":
            self._declare_network(form, pos)
        elif head not in _IGNORED:
            raise Fault(f"unknown command {quote(head)}", pos)

    def _declare_flat(self, form: str, pos: int) -> None:
        match = _FLAT.fullmatch(form)
        if match is None or self.version != "1.0":
            raise Fault(
                f"malformed {quote(form)}: expected (declare-const X_0 Real), in VNN-LIB 1.0 only",
                pos,
            )
        word, letter, index = match.group(1, 2, 3)
        if letter is None:
            raise Fault(
                f"unknown name {quote(word)}: VNN-LIB 1.0 names are X_0, X_1, ... and Y_0, Y_1, "
                "...",
                pos,
            )
        kind, sort = "input" if letter == "X" else "output", match.group(4).lower()
        if sort not in ("real", "int") or self._sorts.setdefault(kind, sort) != sort:
            raise Fault(
                f"sort {quote(match.group(4))} of {word}: expected Real or Int, one for all "
                f"{letter}",
                pos,
            )
        self._declare_elements(kind, (word,), int(index), pos)

    def _declare_elements(self, kind: str, names: Iterable[str], start: int, pos: int) -> None:
        for key, name in enumerate(names, start):
            if name in self._keys:
                raise Fault(f"{name.partition('[')[0]} is declared twice", pos)
            self._keys[name] = key if kind == "input" else ~key
            self.sizes[kind] += 1

    def _declare_network(self, form: str, pos: int) -> None:
        if self.version == "1.0":
            raise Fault("declare-network needs (vnnlib-version <2.0>) as the first form", pos)
        if self._keys:
            raise Fault("two-network queries are not supported yet", pos)
        if not _NETWORK.fullmatch(form):
            raise Fault(
                "malformed declare-network: expected (declare-network NAME (declare-input ...) "
                "...)",
                pos,
            )
        for part in re.finditer(r"\([^()]*\)", form[1:]):
            self._declare_tensor(part.group(), pos + 1 + part.start())

    def _declare_tensor(self, form: str, pos: int) -> None:
        if re.match(r"\(\s*(equal|isomorphic)-to\b", form):
            raise Fault("two-network queries are not supported yet", pos)
        if re.match(r"\(\s*declare-hidden\b", form):
            raise Fault("declare-hidden is not supported yet", pos)
        # `initialized` (2.1) and a quoted ONNX name (drafts of 2.0) change which tensor is meant:
        # not skipped.
        if re.search(r"\binitialized\s*\)\Z", form):
            raise Fault(
                "'initialized' inputs are not supported yet: declare the inputs that are fed", pos
            )
        match = _TENSOR.fullmatch(form)
        if match is None:
            raise Fault(
                f"malformed {quote(form)}: expected (declare-input NAME TYPE [n,n,...])", pos
            )
        kind, name, dtype = match.group(1, 2, 3)
        shape = tuple(int(part) for part in match.group(4).split(",") if part.strip())
        if name in self._tensors:
            raise Fault(f"{name} is declared twice", pos)
        self._tensors.add(name)
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS - sum(self.sizes.values()):
            raise Fault(
                f"{name} {list(shape)} has no element, or there are more than {MAX_ELEMENTS}", pos
            )
        start = self.sizes[kind]
        elements = (f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape)))
        self._declare_elements(kind, elements, start, pos)
        if math.prod(shape) == 1:
            self._keys[name] = start if kind == "input" else ~start
        self._variables[kind].append(Variable(name, dtype, shape))

    def variables(self, kind: str) -> tuple[Variable, ...]:
        """The declared "input" or "output" variables.

        There is at least one, and 1.0 leaves no index out.
        """
        if not self.sizes[kind]:
            raise Fault(f"no {kind} is declared")
        if kind in self._sorts:
            letter, size = "X" if kind == "input" else "Y", self.sizes[kind]
            missing = [index for index in range(size) if f"{letter}_{index}" not in self._keys]
            if missing:
                raise Fault(
                    f"missing index: {letter}_{missing[0]} is not declared, but a higher one is"
                )
            return (Variable(letter, self._sorts[kind], (size,)),)
        return tuple(self._variables[kind])

    def input_name(self, index: int) -> str:
        """What the file calls input element `index`."""
        return next(name for name, key in self._keys.items() if key == index)

    def is_operand(self, word: str) -> bool:
        """Whether a word is a number or a name, maybe of a tensor whose index would follow."""
        return (
            word[:1] in set("+-.0123456789") - {word} or word in self._keys or word in self._tensors
        )

    def operand(self, word: str) -> int | Fraction:
        """The key of a variable (int) or the value of a number (Fraction)."""
        value: int | Fraction | None = self._keys.get(word)
        if value is None:
            value = self._numbers.get(word)
        if value is None and word[0] in "+-.0123456789":
            if len(self._numbers) >= MAX_REMEMBERED:
                self._numbers.clear()
            value = self._numbers[word] = number(word)
        return self._spaced(word) if value is None else value

    def _spaced(self, word: str) -> int:
        """The key of an element whose index is written with spaces, X[0, 3].

        Else says what is wrong with `word`.
        """
        key = self._keys.get("".join(word.split()))
        if key is not None:
            return key
        name = word.partition("[")[0].rstrip()
        for variable in chain(*self._variables.values()):
            if variable.name == name:
                raise Fault(
                    f"{quote(word)} is not an element of {name}, whose shape is "
                    f"{list(variable.shape)}"
                )
        if name.lower() in ("nan", "inf", "infinity"):
            raise Fault(f"bad number {quote(word)}: not finite")
        raise Fault(f"undeclared variable {quote(word)}")
