"""Reads VNN-LIB specifications, versions 1.0 and 2.x, into an exact `Property`.

One pass: a compiled regular expression cuts the text into tokens, of which a whole `(assert (<= X_3 0.5))` is one, so
that 100 MB stay cheap. Nothing recurses: an open parenthesis is a frame on a list, reduced when it closes. A `not` is
pushed inward while reading, as the polarity of the frames below it. The unsafe set is kept as one conjunction and a
list of disjunctions, multiplied out at the end.

Reference: VNN-LIB 1.0 as the VNN-COMP rules and scorer read it, widened by what real files contain; VNN-LIB 2.x as in
github.com/VNNLIB/VNNLIB-Standard (grammar.cf), widened by scientific notation and `=`.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, product
from typing import Final

from qverify.errors import SpecError
from qverify.frontend.constraints import (
    NEGATED,
    Atom,
    Bounds,
    Disjunction,
    Fault,
    Linear,
    arithmetic,
    box,
    compare,
    contradictory,
    decimal,
    linear,
    number,
    quote,
    tighten,
    type_ranges,
)
from qverify.property import Case, Property, Query, Variable

MAX_CASES: Final = 1_000_000  # conjunctions after multiplying out
MAX_SIZE: Final = 50_000_000  # inequalities in them, and bounds in all boxes, at 8 bytes or more each
MAX_ELEMENTS: Final = 4_000_000  # of all 2.x tensors: a shape is believed before anything bounds it
MAX_DEPTH: Final = 10_000  # open parentheses; sums nested once per input are the deepest that real files come
MAX_REMEMBERED: Final = 65_536  # distinct numbers; all those of a large file would cost more than they save

_SPACE = r"[ \t\r\n\f\v]"
_SKIP = rf"(?:{_SPACE}++|;[^\n]*+)*+"
_NAME = r'[^\s()\[\];,"|]++'
_INDEX = r"\[[^\[\]();]*\]"
_TOKEN: Final = re.compile(
    rf"""{_SKIP}(?:
      (?P<simple>(?P<assert>\({_SPACE}*assert{_SPACE}+)?
        \((?P<op>[<>]=?|==?|!=){_SPACE}+(?P<left>{_NAME}(?:{_INDEX})?){_SPACE}+(?P<right>{_NAME}(?:{_INDEX})?)
        {_SPACE}*\)(?(assert){_SPACE}*\)))
    | (?P<open>\({_SKIP}(?P<head>{_NAME})?)
    | (?P<close>\))
    | (?P<word>{_NAME}(?:{_INDEX})?|{_INDEX}|"[^"]*"|\|[^|]*\|)
    | (?P<end>\Z)
    | (?P<bad>.))""",
    re.VERBOSE | re.DOTALL,
)
_COMMENT: Final = re.compile(r";[^\n]*")
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
_TOP_LEVEL: Final = {"assert", "declare-const", "declare-fun", "declare-network", "vnnlib-version"}
_LOGIC: Final = {"and", "or", "not"}
_ARITHMETIC: Final = {"+", "-", "*", "/"}
_SPLIT: Final = "split the property into several files"


def read_property(path: str | os.PathLike[str]) -> Property:
    """The property in the file at `path`, or at `path`.gz where there is no such file; gzip is told by its content.

    Raises SpecError if the file cannot be read, is neither VNN-LIB 1.0 (VNN-COMP rules) nor 2.x (VNNLIB-Standard), or
    uses what is not supported.
    """
    name = os.fspath(path)
    try:
        data = _read_bytes(name)
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{name}: not a VNN-LIB file: byte {error.start} is not UTF-8 text") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SpecError(f"{name}: damaged or truncated gzip file: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SpecError(f"{name}: cannot read: {getattr(error, 'strerror', None) or error}") from error
    del data  # as large as the text
    return parse_property(text, name)


def parse_property(text: str, source: str = "<string>") -> Property:
    """The property that `text` describes, VNN-LIB 1.0 (VNN-COMP rules) or 2.x (VNNLIB-Standard) by its content.

    Raises SpecError, one line that begins with `source` and, where a place is at fault, its line number.
    """
    reader = _Reader(text)
    try:
        reader.read()
        return reader.property()
    except Fault as fault:
        line = "" if fault.pos is None else f":{text.count(chr(10), 0, fault.pos) + 1}"
        raise SpecError(f"{source}{line}: {fault}") from None


def _read_bytes(name: str) -> bytes:
    if not os.path.exists(name) and os.path.exists(name + ".gz"):
        name += ".gz"
    with open(name, "rb") as file:
        return file.read()


class _Names:
    """What is declared: the version, the variables, and the meaning of an operand."""

    def __init__(self) -> None:
        self.version = ""
        self.sizes = {"input": 0, "output": 0}  # elements
        self._variables: dict[str, list[Variable]] = {"input": [], "output": []}  # in 1.0: one each, once complete
        self._sorts: dict[str, str] = {}  # 1.0: of "input" and "output"
        self._keys: dict[str, int] = {}  # "X_3", "X[0,3]": every element, for speed
        self._numbers: dict[str, Fraction] = {}

    def command(self, head: str, form: str, pos: int) -> None:
        """Obey a top-level form that is no assert and whose comments are blanked; it begins at `pos`."""
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
            raise Fault(f"malformed {quote(form)}: expected (declare-const X_0 Real), in VNN-LIB 1.0 only", pos)
        word, letter, index = match.group(1, 2, 3)
        if letter is None:
            raise Fault(f"unknown name {quote(word)}: VNN-LIB 1.0 names are X_0, X_1, ... and Y_0, Y_1, ...", pos)
        kind, sort = "input" if letter == "X" else "output", match.group(4).lower()
        if sort not in ("real", "int") or self._sorts.setdefault(kind, sort) != sort:
            raise Fault(f"sort {quote(match.group(4))} of {word}: expected Real or Int, one for all {letter}", pos)
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
            raise Fault("malformed declare-network: expected (declare-network NAME (declare-input ...) ...)", pos)
        for part in re.finditer(r"\([^()]*\)", form[1:]):
            self._declare_tensor(part.group(), pos + 1 + part.start())

    def _declare_tensor(self, form: str, pos: int) -> None:
        if re.match(r"\(\s*(equal|isomorphic)-to\b", form):
            raise Fault("two-network queries are not supported yet", pos)
        if re.match(r"\(\s*declare-hidden\b", form):
            raise Fault("declare-hidden is not supported yet", pos)
        # `initialized` (2.1) and a quoted ONNX name (drafts of 2.0) change which tensor is meant: not skipped.
        match = _TENSOR.fullmatch(form)
        if match is None:
            raise Fault(f"malformed {quote(form)}: expected (declare-input NAME TYPE [n,n,...])", pos)
        kind, name, dtype = match.group(1, 2, 3)
        shape = tuple(int(part) for part in match.group(4).split(",") if part.strip())
        if any(variable.name == name for variable in chain(*self._variables.values())):
            raise Fault(f"{name} is declared twice", pos)
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS - sum(self.sizes.values()):
            raise Fault(f"{name} {list(shape)} has no element, or there are more than {MAX_ELEMENTS}", pos)
        start = self.sizes[kind]
        elements = (f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape)))
        self._declare_elements(kind, elements, start, pos)
        if math.prod(shape) == 1:
            self._keys[name] = start if kind == "input" else ~start
        self._variables[kind].append(Variable(name, dtype, shape))

    def variables(self, kind: str) -> tuple[Variable, ...]:
        """The declared "input" or "output" variables; there is at least one, and 1.0 leaves no index out."""
        if not self.sizes[kind]:
            raise Fault(f"no {kind} is declared")
        if kind in self._sorts:
            letter, size = "X" if kind == "input" else "Y", self.sizes[kind]
            missing = [index for index in range(size) if f"{letter}_{index}" not in self._keys]
            if missing:
                raise Fault(f"missing index: {letter}_{missing[0]} is not declared, but a higher one is")
            return (Variable(letter, self._sorts[kind], (size,)),)
        return tuple(self._variables[kind])

    def input_name(self, index: int) -> str:
        """What the file calls input element `index`."""
        return next(name for name, key in self._keys.items() if key == index)

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
        """The key of an element whose index is written with spaces, X[0, 3]; else says what is wrong with `word`."""
        key = self._keys.get("".join(word.split()))
        if key is not None:
            return key
        name = word.partition("[")[0]
        for variable in chain(*self._variables.values()):
            if variable.name == name:
                raise Fault(f"{quote(word)} is not an element of {name}, whose shape is {list(variable.shape)}")
        if name.lower() in ("nan", "inf", "infinity"):
            raise Fault(f"bad number {quote(word)}: not finite")
        raise Fault(f"undeclared variable {quote(word)}")


@dataclass(slots=True)
class _Other:
    """An open form that is in no assert; its text is read when it closes."""

    head: str
    pos: int


@dataclass(slots=True)
class _Logic:
    """An open assert, and, or, not: a conjunction (atoms and factors) or a disjunction (cases).

    Inside its own kind it shares its parent's lists: nesting costs nothing, and an `and` at the top is several asserts.
    """

    head: str
    pos: int
    positive: bool = True  # False below an odd number of `not`
    is_or: bool = False  # once `not` is pushed inward
    atoms: list[Atom] = field(default_factory=list)
    factors: list[Disjunction] = field(default_factory=list)  # an empty one makes the conjunction false
    cases: Disjunction = field(default_factory=list)
    children: int = 0

    def add(self, value: Disjunction) -> None:
        """Join the comparison `value` to the conjunction or disjunction."""
        self.children += 1
        if self.is_or:
            self.cases.extend(value)
        elif len(value) == 1:
            self.atoms.extend(value[0])
        else:
            self.factors.append(value)


@dataclass(slots=True)
class _Term:
    """An open comparison or arithmetic form."""

    head: str
    pos: int
    operands: list[Linear] = field(default_factory=list)


def _opened(parent: _Logic | _Term, head: str, pos: int) -> _Logic | _Term:
    """The frame of the form `(head` inside `parent`."""
    known = _LOGIC | NEGATED.keys() if isinstance(parent, _Logic) else _ARITHMETIC
    if head not in known:
        raise Fault(f"unknown operator {quote(head)} in '{parent.head}': expected one of {' '.join(sorted(known))}")
    if isinstance(parent, _Term) or head not in _LOGIC:
        return _Term(head, pos)
    positive = parent.positive != (head == "not")
    is_or = parent.is_or if head == "not" else (head == "or") == positive
    if is_or != parent.is_or:
        return _Logic(head, pos, positive, is_or)
    return _Logic(head, pos, positive, is_or, parent.atoms, parent.factors, parent.cases)


class _Reader:
    """Turns the text into `names` and, in `root`, the conjunction of all asserts."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._stack: list[_Other | _Logic | _Term] = []
        self._names = _Names()
        self._root = _Logic("", 0)
        self._room = MAX_SIZE

    def read(self) -> None:
        handlers = {"simple": self._simple, "open": self._open, "close": self._close, "word": self._word}
        for match in _TOKEN.finditer(self._text):
            kind = match.lastgroup or "end"
            try:
                if kind in handlers:
                    handlers[kind](match)
                elif kind == "bad":
                    raise Fault(f"unexpected character {match.group(kind)!r}")
                elif self._stack:
                    raise self._unclosed(match.end())
            except Fault as fault:
                fault.pos = match.start(kind) if fault.pos is None else fault.pos
                raise
        if not self._names.version:
            raise Fault("empty file: it declares nothing")

    def _simple(self, match: re.Match[str]) -> None:
        """`(op a b)` of two plain operands, or the whole assert around it: nearly every line of a large file."""
        op, left, right = match.group("op", "left", "right")
        parent = self._stack[-1] if self._stack else None
        if match.group("assert"):
            if parent is not None:
                raise self._unclosed(match.start("assert"))
            parent = self._root
        if not isinstance(parent, _Logic):
            raise Fault(f"a comparison '{op}' cannot stand here")
        a, b = self._names.operand(left), self._names.operand(right)
        if not isinstance(b, int) and isinstance(a, int) and a >= 0 and parent.positive and op in ("<=", ">="):
            parent.add([((2 * a + (op == "<="), b, False),)])
        else:
            parent.add(compare(op, linear(a), linear(b), parent.positive))

    def _open(self, match: re.Match[str]) -> None:
        pos, head = match.start("open"), match.group("head") or ""
        parent = self._stack[-1] if self._stack else None
        if len(self._stack) >= MAX_DEPTH:
            raise Fault(f"more than {MAX_DEPTH} nested parentheses")
        if parent is not None and head in _TOP_LEVEL:
            raise self._unclosed(pos)
        if isinstance(parent, _Logic | _Term):
            self._stack.append(_opened(parent, head, pos))
        elif parent is None and head == "assert":
            self._stack.append(_Logic(head, pos, atoms=self._root.atoms, factors=self._root.factors))
        else:
            self._stack.append(_Other(head, pos))

    def _close(self, match: re.Match[str]) -> None:
        if not self._stack:
            raise Fault("unbalanced parenthesis: ')' closes nothing")
        frame = self._stack.pop()
        parent = self._stack[-1] if self._stack else self._root
        if isinstance(frame, _Logic) and isinstance(parent, _Logic):
            self._close_logic(frame, parent)
        elif isinstance(frame, _Term) and isinstance(parent, _Logic):
            if len(frame.operands) != 2:
                raise Fault(f"'{frame.head}' needs 2 operands, not {len(frame.operands)}", frame.pos)
            parent.add(compare(frame.head, frame.operands[0], frame.operands[1], parent.positive))
        elif isinstance(frame, _Term) and isinstance(parent, _Term):
            parent.operands.append(arithmetic(frame.head, frame.operands))
        elif not self._stack:
            form = self._text[frame.pos : match.end()]
            blanked = _COMMENT.sub(lambda comment: " " * len(comment.group()), form)
            self._names.command(frame.head, blanked, frame.pos)

    def _close_logic(self, frame: _Logic, parent: _Logic) -> None:
        if frame.children == 0 or (frame.children > 1 and frame.head in ("assert", "not")):
            wanted = "at least" if frame.head in ("and", "or") else "exactly"
            raise Fault(f"'{frame.head}' needs {wanted} one condition, not {frame.children}", frame.pos)
        parent.children += 1
        if frame.is_or and not parent.is_or:
            parent.factors.append(frame.cases)
        elif parent.is_or and not frame.is_or:
            parent.cases.extend(self._multiplied(frame.atoms, frame.factors))

    def _word(self, match: re.Match[str]) -> None:
        word, frame = match.group("word"), self._stack[-1] if self._stack else None
        if isinstance(frame, _Term):
            frame.operands.append(linear(self._names.operand(word)))
        elif not isinstance(frame, _Other):
            raise Fault(f"unexpected {quote(word)}" + (f": '{frame.head}' needs conditions" if frame else ""))

    def _unclosed(self, pos: int) -> Fault:
        """A command begins at `pos`, or the text ends there, while forms are open: blame where the outermost opened."""
        frame, line = self._stack[0], self._text.count("\n", 0, pos) + 1
        return Fault(f"unbalanced parenthesis: {quote('(' + frame.head)} is not closed by line {line}", frame.pos)

    def _multiplied(self, atoms: list[Atom], factors: list[Disjunction]) -> Disjunction:
        """`atoms` and one case of each factor, in every combination, in the order of the file."""
        count = 1
        for factor in sorted(factors, key=len):  # an empty one first: false, however many the others are
            count *= len(factor)
            if count > MAX_CASES:
                raise Fault(f"more than {MAX_CASES} cases after multiplying out: {_SPLIT}")
        if count == 0:
            return []
        chosen = sum(count // len(factor) * sum(map(len, factor)) for factor in factors)
        self._spend(count * (1 + len(atoms)) + chosen)
        return [tuple(chain(atoms, *choice)) for choice in product(*factors)]

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise Fault(f"more than {MAX_SIZE} inequalities after multiplying out: {_SPLIT}")

    def property(self) -> Property:
        """The property read, with one query for each distinct box."""
        inputs, outputs = self._names.variables("input"), self._names.variables("output")
        outer = type_ranges(inputs)
        common = tighten(outer, self._root.atoms, {})
        self._check_bounds(outer)
        count = self._names.sizes["input"]
        unbounded = [key for key in range(2 * count) if key not in outer]
        groups: dict[frozenset[tuple[int, tuple[Fraction, bool]]], tuple[Bounds, dict[Case, None]]] = {}
        conjunctions = self._multiplied([], self._root.factors)
        self._spend(len(conjunctions) * len(common))
        for atoms in conjunctions:
            bounds: Bounds = {}
            rows = common + tighten(bounds, atoms, outer)
            if any(contradictory(index, bounds, outer) for index in {key >> 1 for key in bounds}):
                continue
            for key in unbounded:
                if key not in bounds:
                    raise Fault(f"{self._names.input_name(key >> 1)} has no {'upper' if key & 1 else 'lower'} bound")
            _, cases = groups.setdefault(frozenset(bounds.items()), (bounds, {}))
            cases[tuple(dict.fromkeys(rows))] = None
        self._spend(2 * count * len(groups))
        queries = [Query(box(count, {**outer, **bounds}), tuple(cases)) for bounds, cases in groups.values()]
        return Property(self._names.version, inputs, outputs, tuple(queries))

    def _check_bounds(self, bounds: Bounds) -> None:
        for key in bounds:
            if not key & 1 and contradictory(key >> 1, bounds, {}):
                (lower, _), (upper, _) = bounds[key], bounds[key + 1]
                ends = f"lower {decimal(lower)} {'>' if lower > upper else '='} upper {decimal(upper)}"
                excluded = "" if lower > upper else ", and that value is excluded"
                raise Fault(f"contradictory bounds for {self._names.input_name(key >> 1)}: {ends}{excluded}")
