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
from qverify.property import Box, Case, Property, Query, Row, Variable

MAX_CASES: Final = 1_000_000  # conjunctions after multiplying out
MAX_SIZE: Final = 50_000_000  # inequalities in them, and bounds in all boxes, at 8 bytes or more each
MAX_ELEMENTS: Final = 4_000_000  # of all 2.x tensors: a shape is believed before anything bounds it
MAX_DEPTH: Final = 10_000  # open parentheses; sums nested once per input are the deepest that real files come
MAX_EXPONENT: Final = 1_000  # float64 ends at 1e308 and 5e-324
MAX_DIGITS: Final = 2_000  # the exact decimal of any float64 has fewer than 1,100
MAX_BITS: Final = 32_768  # of a computed number, so that a chain of products cannot grow without end
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
_NUMBER: Final = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_INTEGER_TYPE: Final = re.compile(r"(u?)int(2|4|8|16|32|64)")
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
_NEGATED: Final = {"<=": ">", ">=": "<", "<": ">=", ">": "<=", "==": "!=", "=": "!=", "!=": "=="}
_SPLIT: Final = "split the property into several files"

_ZERO: Final = Fraction(0)
_ONE: Final = Fraction(1)
_SHARED: Final = {_ONE: _ONE, -_ONE: -_ONE}  # nearly all coefficients of real files: one object each

# X_i has the key i and Y_j the key ~j (that is -1 - j), so that one dictionary holds both.
Linear = tuple[dict[int, Fraction], Fraction]  # sum of coefficient * variable, plus a constant
# Of X_i the lower bound has the key 2 * i and the upper bound 2 * i + 1; the bool says that the bound is excluded.
Bound = tuple[int, Fraction, bool]
Bounds = dict[int, tuple[Fraction, bool]]
Atom = Bound | Row
Disjunction = list[tuple[Atom, ...]]  # of conjunctions: [] is false, [()] is true


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
    except _Fault as fault:
        line = "" if fault.pos is None else f":{text.count(chr(10), 0, fault.pos) + 1}"
        raise SpecError(f"{source}{line}: {fault}") from None


def _read_bytes(name: str) -> bytes:
    if not os.path.exists(name) and os.path.exists(name + ".gz"):
        name += ".gz"
    with open(name, "rb") as file:
        return file.read()


class _Fault(Exception):
    """A SpecError in the making: `parse_property` adds source and line."""

    def __init__(self, message: str, pos: int | None = None) -> None:
        super().__init__(message)
        self.pos = pos  # in the text; the reader puts the current token's where none is given


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
                raise _Fault("expected one (vnnlib-version <2.0>), or 2.x, as the first form", pos)
            self.version = match.group(1)
            return
        self.version = self.version or "1.0"
        if head in ("declare-const", "declare-fun"):
            self._declare_flat(form, pos)
        elif head == "declare-network":
            self._declare_network(form, pos)
        elif head not in _IGNORED:
            raise _Fault(f"unknown command {_quote(head)}", pos)

    def _declare_flat(self, form: str, pos: int) -> None:
        match = _FLAT.fullmatch(form)
        if match is None or self.version != "1.0":
            raise _Fault(f"malformed {_quote(form)}: expected (declare-const X_0 Real), in VNN-LIB 1.0 only", pos)
        word, letter, index = match.group(1, 2, 3)
        if letter is None:
            raise _Fault(f"unknown name {_quote(word)}: VNN-LIB 1.0 names are X_0, X_1, ... and Y_0, Y_1, ...", pos)
        kind, sort = "input" if letter == "X" else "output", match.group(4).lower()
        if sort not in ("real", "int") or self._sorts.setdefault(kind, sort) != sort:
            raise _Fault(f"sort {_quote(match.group(4))} of {word}: expected Real or Int, one for all {letter}", pos)
        self._declare_elements(kind, (word,), int(index), pos)

    def _declare_elements(self, kind: str, names: Iterable[str], start: int, pos: int) -> None:
        for key, name in enumerate(names, start):
            if name in self._keys:
                raise _Fault(f"{name.partition('[')[0]} is declared twice", pos)
            self._keys[name] = key if kind == "input" else ~key
            self.sizes[kind] += 1

    def _declare_network(self, form: str, pos: int) -> None:
        if self.version == "1.0":
            raise _Fault("declare-network needs (vnnlib-version <2.0>) as the first form", pos)
        if self._keys:
            raise _Fault("two-network queries are not supported yet", pos)
        if not _NETWORK.fullmatch(form):
            raise _Fault("malformed declare-network: expected (declare-network NAME (declare-input ...) ...)", pos)
        for part in re.finditer(r"\([^()]*\)", form[1:]):
            self._declare_tensor(part.group(), pos + 1 + part.start())

    def _declare_tensor(self, form: str, pos: int) -> None:
        if re.match(r"\(\s*(equal|isomorphic)-to\b", form):
            raise _Fault("two-network queries are not supported yet", pos)
        if re.match(r"\(\s*declare-hidden\b", form):
            raise _Fault("declare-hidden is not supported yet", pos)
        # `initialized` (2.1) and a quoted ONNX name (drafts of 2.0) change which tensor is meant: not skipped.
        match = _TENSOR.fullmatch(form)
        if match is None:
            raise _Fault(f"malformed {_quote(form)}: expected (declare-input NAME TYPE [n,n,...])", pos)
        kind, name, dtype = match.group(1, 2, 3)
        shape = tuple(int(part) for part in match.group(4).split(",") if part.strip())
        if any(variable.name == name for variable in chain(*self._variables.values())):
            raise _Fault(f"{name} is declared twice", pos)
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS - sum(self.sizes.values()):
            raise _Fault(f"{name} {list(shape)} has no element, or there are more than {MAX_ELEMENTS}", pos)
        start = self.sizes[kind]
        elements = (f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape)))
        self._declare_elements(kind, elements, start, pos)
        if math.prod(shape) == 1:
            self._keys[name] = start if kind == "input" else ~start
        self._variables[kind].append(Variable(name, dtype, shape))

    def variables(self, kind: str) -> tuple[Variable, ...]:
        """The declared "input" or "output" variables; there is at least one, and 1.0 leaves no index out."""
        if not self.sizes[kind]:
            raise _Fault(f"no {kind} is declared")
        if kind in self._sorts:
            letter, size = "X" if kind == "input" else "Y", self.sizes[kind]
            missing = [index for index in range(size) if f"{letter}_{index}" not in self._keys]
            if missing:
                raise _Fault(f"missing index: {letter}_{missing[0]} is not declared, but a higher one is")
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
            value = self._numbers[word] = _number(word)
        return self._spaced(word) if value is None else value

    def _spaced(self, word: str) -> int:
        """The key of an element whose index is written with spaces, X[0, 3]; else says what is wrong with `word`."""
        key = self._keys.get("".join(word.split()))
        if key is not None:
            return key
        name = word.partition("[")[0]
        for variable in chain(*self._variables.values()):
            if variable.name == name:
                raise _Fault(f"{_quote(word)} is not an element of {name}, whose shape is {list(variable.shape)}")
        if name.lower() in ("nan", "inf", "infinity"):
            raise _Fault(f"bad number {_quote(word)}: not finite")
        raise _Fault(f"undeclared variable {_quote(word)}")


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
    known = _LOGIC | _NEGATED.keys() if isinstance(parent, _Logic) else _ARITHMETIC
    if head not in known:
        raise _Fault(f"unknown operator {_quote(head)} in '{parent.head}': expected one of {' '.join(sorted(known))}")
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
                    raise _Fault(f"unexpected character {match.group(kind)!r}")
                elif self._stack:
                    raise self._unclosed(match.end())
            except _Fault as fault:
                fault.pos = match.start(kind) if fault.pos is None else fault.pos
                raise
        if not self._names.version:
            raise _Fault("empty file: it declares nothing")

    def _simple(self, match: re.Match[str]) -> None:
        """`(op a b)` of two plain operands, or the whole assert around it: nearly every line of a large file."""
        op, left, right = match.group("op", "left", "right")
        parent = self._stack[-1] if self._stack else None
        if match.group("assert"):
            if parent is not None:
                raise self._unclosed(match.start("assert"))
            parent = self._root
        if not isinstance(parent, _Logic):
            raise _Fault(f"a comparison '{op}' cannot stand here")
        a, b = self._names.operand(left), self._names.operand(right)
        if not isinstance(b, int) and isinstance(a, int) and a >= 0 and parent.positive and op in ("<=", ">="):
            parent.add([((2 * a + (op == "<="), b, False),)])
        else:
            parent.add(_compare(op, _linear(a), _linear(b), parent.positive))

    def _open(self, match: re.Match[str]) -> None:
        pos, head = match.start("open"), match.group("head") or ""
        parent = self._stack[-1] if self._stack else None
        if len(self._stack) >= MAX_DEPTH:
            raise _Fault(f"more than {MAX_DEPTH} nested parentheses")
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
            raise _Fault("unbalanced parenthesis: ')' closes nothing")
        frame = self._stack.pop()
        parent = self._stack[-1] if self._stack else self._root
        if isinstance(frame, _Logic) and isinstance(parent, _Logic):
            self._close_logic(frame, parent)
        elif isinstance(frame, _Term) and isinstance(parent, _Logic):
            if len(frame.operands) != 2:
                raise _Fault(f"'{frame.head}' needs 2 operands, not {len(frame.operands)}", frame.pos)
            parent.add(_compare(frame.head, frame.operands[0], frame.operands[1], parent.positive))
        elif isinstance(frame, _Term) and isinstance(parent, _Term):
            parent.operands.append(_arithmetic(frame.head, frame.operands))
        elif not self._stack:
            form = self._text[frame.pos : match.end()]
            blanked = _COMMENT.sub(lambda comment: " " * len(comment.group()), form)
            self._names.command(frame.head, blanked, frame.pos)

    def _close_logic(self, frame: _Logic, parent: _Logic) -> None:
        if frame.children == 0 or (frame.children > 1 and frame.head in ("assert", "not")):
            wanted = "at least" if frame.head in ("and", "or") else "exactly"
            raise _Fault(f"'{frame.head}' needs {wanted} one condition, not {frame.children}", frame.pos)
        parent.children += 1
        if frame.is_or and not parent.is_or:
            parent.factors.append(frame.cases)
        elif parent.is_or and not frame.is_or:
            parent.cases.extend(self._multiplied(frame.atoms, frame.factors))

    def _word(self, match: re.Match[str]) -> None:
        word, frame = match.group("word"), self._stack[-1] if self._stack else None
        if isinstance(frame, _Term):
            frame.operands.append(_linear(self._names.operand(word)))
        elif not isinstance(frame, _Other):
            raise _Fault(f"unexpected {_quote(word)}" + (f": '{frame.head}' needs conditions" if frame else ""))

    def _unclosed(self, pos: int) -> _Fault:
        """A command begins at `pos`, or the text ends there, while forms are open: blame where the outermost opened."""
        frame, line = self._stack[0], self._text.count("\n", 0, pos) + 1
        return _Fault(f"unbalanced parenthesis: {_quote('(' + frame.head)} is not closed by line {line}", frame.pos)

    def _multiplied(self, atoms: list[Atom], factors: list[Disjunction]) -> Disjunction:
        """`atoms` and one case of each factor, in every combination, in the order of the file."""
        count = 1
        for factor in sorted(factors, key=len):  # an empty one first: false, however many the others are
            count *= len(factor)
            if count > MAX_CASES:
                raise _Fault(f"more than {MAX_CASES} cases after multiplying out: {_SPLIT}")
        if count == 0:
            return []
        chosen = sum(count // len(factor) * sum(map(len, factor)) for factor in factors)
        self._spend(count * (1 + len(atoms)) + chosen)
        return [tuple(chain(atoms, *choice)) for choice in product(*factors)]

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise _Fault(f"more than {MAX_SIZE} inequalities after multiplying out: {_SPLIT}")

    def property(self) -> Property:
        """The property read, with one query for each distinct box."""
        inputs, outputs = self._names.variables("input"), self._names.variables("output")
        outer = _type_ranges(inputs)
        common = _tighten(outer, self._root.atoms, {})
        self._check_bounds(outer)
        count = self._names.sizes["input"]
        unbounded = [key for key in range(2 * count) if key not in outer]
        groups: dict[frozenset[tuple[int, tuple[Fraction, bool]]], tuple[Bounds, dict[Case, None]]] = {}
        conjunctions = self._multiplied([], self._root.factors)
        self._spend(len(conjunctions) * len(common))
        for atoms in conjunctions:
            bounds: Bounds = {}
            rows = common + _tighten(bounds, atoms, outer)
            if any(_contradictory(index, bounds, outer) for index in {key >> 1 for key in bounds}):
                continue
            for key in unbounded:
                if key not in bounds:
                    raise _Fault(f"{self._names.input_name(key >> 1)} has no {'upper' if key & 1 else 'lower'} bound")
            _, cases = groups.setdefault(frozenset(bounds.items()), (bounds, {}))
            cases[tuple(dict.fromkeys(rows))] = None
        self._spend(2 * count * len(groups))
        queries = [Query(_box(count, {**outer, **bounds}), tuple(cases)) for bounds, cases in groups.values()]
        return Property(self._names.version, inputs, outputs, tuple(queries))

    def _check_bounds(self, bounds: Bounds) -> None:
        for key in bounds:
            if not key & 1 and _contradictory(key >> 1, bounds, {}):
                (lower, _), (upper, _) = bounds[key], bounds[key + 1]
                ends = f"lower {_decimal(lower)} {'>' if lower > upper else '='} upper {_decimal(upper)}"
                excluded = "" if lower > upper else ", and that value is excluded"
                raise _Fault(f"contradictory bounds for {self._names.input_name(key >> 1)}: {ends}{excluded}")


# --- linear inequalities ---------------------------------------------------------------------------------------------


def _linear(operand: int | Fraction) -> Linear:
    return ({operand: _ONE}, _ZERO) if isinstance(operand, int) else ({}, operand)


def _arithmetic(head: str, operands: list[Linear]) -> Linear:
    """`(head operands ...)`; may reuse the operands' dictionaries."""
    if len(operands) < (2 if head == "/" else 1):
        raise _Fault(f"'{head}' needs more operands")
    if head == "+":
        return _sum(operands)
    if head == "-":
        start = min(1, len(operands) - 1)  # (- a) is -a
        return _sum(operands[:start] + [_scaled(operand, -_ONE) for operand in operands[start:]])
    result = operands[0]
    for operand in operands[1:]:
        variables, constant = operand
        if variables and (head == "/" or result[0]):
            raise _Fault(f"not linear: '{head}' of variables")
        if head == "/" and not constant:
            raise _Fault("division by zero")
        factor = 1 / constant if head == "/" else constant
        result = _scaled(operand, result[1]) if variables else _scaled(result, factor)
    return result


def _sum(operands: list[Linear]) -> Linear:
    # Into the longest, in place: a sum nested (+ a (+ b (+ c ...))) takes linear time.
    terms = max((terms for terms, _ in operands), key=len)
    constant = _ZERO
    for others, other_constant in operands:
        constant = _checked(constant + other_constant)
        for key, coefficient in others.items() if others is not terms else ():
            total = _checked(terms.get(key, _ZERO) + coefficient)
            if total:
                terms[key] = total
            else:
                del terms[key]
    return terms, constant


def _scaled(operand: Linear, factor: Fraction) -> Linear:
    terms = {key: _checked(factor * coefficient) for key, coefficient in operand[0].items()} if factor else {}
    return terms, _checked(factor * operand[1])


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise _Fault(f"a computed number has more than {MAX_BITS} bits")
    return value


def _compare(op: str, left: Linear, right: Linear, positive: bool) -> Disjunction:
    """`left op right`, or its negation."""
    op = op if positive else _NEGATED[op]
    if op == "!=":
        return _below(left, right, True) + _below(right, left, True)
    if op in ("=", "=="):
        return [a + b for a in _below(left, right, False) for b in _below(right, left, False)]
    if op in (">", ">="):
        left, right = right, left
    return _below(left, right, op in ("<", ">"))


def _below(left: Linear, right: Linear, strict: bool) -> Disjunction:
    """`left <= right` (or `<`): a bound if it has one X and nothing else, a truth value if it has no variable."""
    terms, rhs = dict(left[0]), right[1] - left[1]
    for key, coefficient in right[0].items():
        terms[key] = terms.get(key, _ZERO) - coefficient
    x = tuple(sorted((key, _SHARED.get(value, value)) for key, value in terms.items() if key >= 0 and value))
    y = tuple(sorted((~key, _SHARED.get(value, value)) for key, value in terms.items() if key < 0 and value))
    if y or len(x) > 1:
        return [(Row(x, y, rhs, strict),)]
    if not x:
        return [()] if rhs > 0 or (rhs == 0 and not strict) else []
    index, coefficient = x[0]
    return [((2 * index + (coefficient > 0), rhs / coefficient, strict),)]


# --- bounds ----------------------------------------------------------------------------------------------------------


def _type_ranges(inputs: tuple[Variable, ...]) -> Bounds:
    """The bounds that an input of an integer type has by its type."""
    bounds: Bounds = {}
    start = 0
    for variable in inputs:
        stop = start + 2 * math.prod(variable.shape)
        if match := _INTEGER_TYPE.fullmatch(variable.dtype):
            count = 2 ** int(match.group(2))
            lower = Fraction(0 if match.group(1) else -count // 2)
            ends = (lower, False), (lower + count - 1, False)
            bounds.update((key, ends[key & 1]) for key in range(start, stop))
        start = stop
    return bounds


def _tighten(bounds: Bounds, atoms: Iterable[Atom], outer: Bounds) -> list[Row]:
    """Put the atoms that are bounds, where tighter than those in `outer`, into `bounds`; return the rows."""
    rows: list[Row] = []
    for atom in atoms:
        if isinstance(atom, Row):
            rows.append(atom)
            continue
        key, value, strict = atom
        old = bounds.get(key) or outer.get(key)
        if old is None or (strict and not old[1] if value == old[0] else (value < old[0]) == bool(key & 1)):
            bounds[key] = (value, strict)
    return rows


def _contradictory(index: int, bounds: Bounds, outer: Bounds) -> bool:
    lower = bounds.get(2 * index) or outer.get(2 * index)
    upper = bounds.get(2 * index + 1) or outer.get(2 * index + 1)
    if lower is None or upper is None:
        return False
    return lower[0] > upper[0] or (lower[0] == upper[0] and (lower[1] or upper[1]))


def _box(count: int, bounds: Bounds) -> Box:
    lower, upper = (tuple([bounds[2 * index + side][0] for index in range(count)]) for side in (0, 1))
    strict = [frozenset(key >> 1 for key, bound in bounds.items() if bound[1] and key & 1 == side) for side in (0, 1)]
    return Box(lower, upper, strict[0], strict[1])


# --- words -----------------------------------------------------------------------------------------------------------


def _number(word: str) -> Fraction:
    """The exact value of a decimal."""
    match = _NUMBER.fullmatch(word)
    if match is None:
        raise _Fault(f"bad number {_quote(word)}")
    sign, whole, part, exponent = match.group(1), match.group(2), match.group(3) or "", match.group(4) or "0"
    if len(word) > MAX_DIGITS or abs(int(exponent)) > MAX_EXPONENT:
        raise _Fault(f"bad number {_quote(word)}: too large, too small or too long")
    value, scale = int(sign + whole + part), int(exponent) - len(part)
    return Fraction(value * 10**scale) if scale >= 0 else Fraction(value, 10**-scale)


def _quote(word: str) -> str:
    return repr(word if len(word) <= 60 else word[:57] + "...")


def _decimal(value: Fraction) -> str:
    """A short decimal where it is exact, else the fraction; huge ones in words, which str() would refuse."""
    if value.numerator.bit_length() + value.denominator.bit_length() > 1000:
        return f"about {'-' if value < 0 else ''}2^{value.numerator.bit_length() - value.denominator.bit_length()}"
    text = str(value) if value.denominator == 1 else repr(float(value))
    return text if Fraction(text) == value else str(value)
