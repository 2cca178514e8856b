"""Reads VNN-LIB specifications, versions 1.0 and 2.x, into an exact `Property`.

One pass: a compiled regular expression cuts the text into tokens, of which a whole `(assert (<= X_3
0.5))` is one, so that 100 MB stay cheap. Nothing recurses: an open parenthesis is a frame on a
list, reduced when it closes. A `not` is pushed inward while reading, as the polarity of the frames
below it. The unsafe set is kept as one conjunction and a list of disjunctions, multiplied out at
the end.

Reference: VNN-LIB 1.0 as the VNN-COMP rules and scorer read it, widened by what real files contain;
VNN-LIB 2.x as in github.com/VNNLIB/VNNLIB-Standard (grammar.cf), widened by scientific notation and
`=`.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Final

from qverify.deadline import looking
from qverify.errors import SpecError
from qverify.files import Damaged, unpacked
from qverify.property import Case, Property, Query
from qverify.vnnlib.constraints import (
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
    distinct,
    float_ranges,
    linear,
    quote,
    tighten,
    type_ranges,
)
from qverify.vnnlib.declarations import Names

MAX_BYTES: Final = 1 << 30  # of text; the largest known property has 124 MB
MAX_CASES: Final = 1_000_000  # conjunctions after multiplying out
# Inequalities in them, and bounds in all boxes, at 8 bytes or more each.
MAX_SIZE: Final = 50_000_000
# Of numbers, in all sums; and more for every character of the file.
LEAST_PRODUCTS: Final = 1_000_000
MAX_PRODUCTS: Final = 2
# Open parentheses; sums nested once per input are the deepest that real files come.
MAX_DEPTH: Final = 10_000

_SPACE = r"[ \t\r\n\f\v]"
_SKIP = rf"(?:{_SPACE}++|;[^\n]*+)*+"
_NAME = r'[^\s()\[\];,"|]++'
_INDEX = r"\[[^\[\]();]*\]"
_OPERAND = rf"{_NAME}(?:{_SPACE}*+{_INDEX})?"  # the reference library prints X [0, 3]
_TOKEN: Final = re.compile(
    rf"""{_SKIP}(?:
      (?P<simple>(?P<assert>\({_SPACE}*assert{_SPACE}+)?
        \((?P<op>[<>]=?|==?|!=){_SPACE}+(?P<left>{_OPERAND}){_SPACE}+(?P<right>{_OPERAND})
        {_SPACE}*\)(?(assert){_SPACE}*\)))
    | (?P<open>\({_SKIP}(?P<head>{_NAME})?)
    | (?P<close>\))
    | (?P<word>{_OPERAND}|{_INDEX}|"[^"]*"|\|[^|]*\|)
    | (?P<end>\Z)
    | (?P<bad>.))""",
    re.VERBOSE | re.DOTALL,
)
_COMMENT: Final = re.compile(r";[^\n]*")
_TOP_LEVEL: Final = {"assert", "declare-const", "declare-fun", "declare-network", "vnnlib-version"}
_LOGIC: Final = {"and", "or", "not"}
_ARITHMETIC: Final = {"+", "-", "*", "/"}
_SPLIT: Final = "split the property into several files"


def read_property(path: str | os.PathLike[str]) -> Property:
    """The property in the file at `path`, or at `path`.gz where there is no such file.

    Gzip is told by its content.

    Raises SpecError if the file cannot be read, is neither VNN-LIB 1.0 (VNN-COMP rules) nor 2.x
    (VNNLIB-Standard), or uses what is not supported.
    """
    name = os.fspath(path)
    try:
        text = unpacked(Path(name), MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{name}: not a VNN-LIB file: byte {error.start} is not UTF-8 text"
        ) from error
    except Damaged as error:
        raise SpecError(f"{name}: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SpecError(
            f"{name}: cannot read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return parse_property(text, name)


def property_sha256(path: Path) -> str:
    """The SHA-256 of a property's text, unpacked: packing it changes no certificate."""
    return hashlib.sha256(unpacked(path, MAX_BYTES)).hexdigest()


def parse_property(text: str, source: str = "<string>") -> Property:
    """The property that `text` describes: VNN-LIB 1.0 (VNN-COMP rules) or 2.x, by its content.

    Raises SpecError, one line that begins with `source` and, where a place is at fault, its line
    number.
    """
    reader = _TextReader(text)
    try:
        reader.read()
        return reader.property()
    except Fault as fault:
        line = "" if fault.pos is None else f":{text.count(chr(10), 0, fault.pos) + 1}"
        raise SpecError(f"{source}{line}: {fault}") from None


@dataclass(slots=True)
class _Other:
    """An open form that is in no assert; its text is read when it closes."""

    head: str
    pos: int


@dataclass(slots=True)
class _Logic:
    """An open assert, and, or, not: a conjunction (atoms and factors) or a disjunction (cases).

    Inside its own kind it shares its parent's lists: nesting costs nothing, and an `and` at the top
    is several asserts.
    """

    head: str
    pos: int
    positive: bool = True  # False below an odd number of `not`
    is_or: bool = False  # once `not` is pushed inward
    atoms: list[Atom] = field(default_factory=list)
    # An empty one makes the conjunction false.
    factors: list[Disjunction] = field(default_factory=list)
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
        raise Fault(
            f"unknown operator {quote(head)} in '{parent.head}': expected one of "
            f"{' '.join(sorted(known))}"
        )
    if isinstance(parent, _Term) or head not in _LOGIC:
        return _Term(head, pos)
    positive = parent.positive != (head == "not")
    is_or = parent.is_or if head == "not" else (head == "or") == positive
    if is_or != parent.is_or:
        return _Logic(head, pos, positive, is_or)
    return _Logic(head, pos, positive, is_or, parent.atoms, parent.factors, parent.cases)


class _TextReader:
    """Turns the text into `names` and, in `root`, the conjunction of all asserts."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._stack: list[_Other | _Logic | _Term] = []
        self._names = Names()
        self._root = _Logic("", 0)
        self._room = MAX_SIZE
        # So that time stays linear in the text.
        self._products = LEAST_PRODUCTS + MAX_PRODUCTS * len(text)

    def read(self) -> None:
        handlers = {
            "simple": self._simple,
            "open": self._open,
            "close": self._close,
            "word": self._word,
        }
        for match in looking(_TOKEN.finditer(self._text), 4096):
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
        """`(op a b)` of two plain operands, or the whole assert around it.

        Nearly every line of a large file is one.
        """
        op, left, right = match.group("op", "left", "right")
        parent = self._stack[-1] if self._stack else None
        if match.group("assert"):
            if parent is not None:
                raise self._unclosed(match.start("assert"))
            parent = self._root
        if not isinstance(parent, _Logic):
            raise Fault(f"a comparison '{op}' cannot stand here")
        a, b = self._names.operand(left), self._names.operand(right)
        if (
            not isinstance(b, int)
            and isinstance(a, int)
            and a >= 0
            and parent.positive
            and op in ("<=", ">=")
        ):
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
            if self._names.is_operand(head):
                raise Fault(
                    f"{quote(head)} cannot stand first: write (>= {head} ...), not ({head} >= ...)",
                    pos,
                )
            self._stack.append(_opened(parent, head, pos))
        elif parent is None and head == "assert":
            self._stack.append(
                _Logic(head, pos, atoms=self._root.atoms, factors=self._root.factors)
            )
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
                raise Fault(
                    f"'{frame.head}' needs 2 operands, not {len(frame.operands)}", frame.pos
                )
            parent.add(compare(frame.head, frame.operands[0], frame.operands[1], parent.positive))
        elif isinstance(frame, _Term) and isinstance(parent, _Term):
            if frame.head != "+":
                self._multiply(sum(len(operand[0]) for operand in frame.operands), frame.pos)
            parent.operands.append(arithmetic(frame.head, frame.operands))
        elif not self._stack:
            form = self._text[frame.pos : match.end()]
            blanked = _COMMENT.sub(lambda comment: " " * len(comment.group()), form)
            self._names.command(frame.head, blanked, frame.pos)

    def _close_logic(self, frame: _Logic, parent: _Logic) -> None:
        if frame.children == 0 or (frame.children > 1 and frame.head in ("assert", "not")):
            wanted = "at least" if frame.head in ("and", "or") else "exactly"
            raise Fault(
                f"'{frame.head}' needs {wanted} one condition, not {frame.children}", frame.pos
            )
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
            raise Fault(
                f"unexpected {quote(word)}"
                + (f": '{frame.head}' needs conditions" if frame else "")
            )

    def _unclosed(self, pos: int) -> Fault:
        """A command begins at `pos`, or the text ends there, while forms are open.

        The place where the outermost one opened is to blame.
        """
        frame, line = self._stack[0], self._text.count("\n", 0, pos) + 1
        return Fault(
            f"unbalanced parenthesis: {quote('(' + frame.head)} is not closed by line {line}",
            frame.pos,
        )

    def _multiplied(self, atoms: list[Atom], factors: list[Disjunction]) -> Disjunction:
        """`atoms` and one case of each factor, in every combination, in the order of the file."""
        count = 1
        # An empty one first: false, however many the others are.
        for factor in sorted(factors, key=len):
            count *= len(factor)
            if count > MAX_CASES:
                raise Fault(f"more than {MAX_CASES} cases after multiplying out: {_SPLIT}")
        if count == 0:
            return []
        if not atoms and len(factors) == 1:  # once for every level of a deep nest
            self._spend(count)
            return factors[0]
        chosen = sum(count // len(factor) * sum(map(len, factor)) for factor in factors)
        self._spend(count * (1 + len(atoms)) + chosen)
        return [tuple(chain(atoms, *choice)) for choice in looking(product(*factors), 1024)]

    def _multiply(self, terms: int, pos: int) -> None:
        """Note that terms are multiplied.

        Often in all only where products or differences nest around long sums.
        """
        self._products -= terms
        if self._products < 0:
            raise Fault(
                "products or differences nest too deeply around sums: multiply them out", pos
            )

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise Fault(f"more than {MAX_SIZE} inequalities after multiplying out: {_SPLIT}")

    def property(self) -> Property:
        """The property read, with one query for each distinct box."""
        names, root = self._names, self._root
        inputs, outputs = names.variables("input"), names.variables("output")
        outer, count = type_ranges(inputs), names.sizes["input"]
        second = names.version != "1.0"
        common = tighten(outer, root.atoms, {}, second)
        unbounded = [key for key in range(2 * count) if key not in outer]
        if second and unbounded:
            outer = float_ranges(inputs) | outer
        if empty := self._contradiction(outer):
            if not second:
                raise Fault(empty)
            return Property(names.version, inputs, outputs, (), (f"no input is allowed: {empty}",))
        # By the bounds that a case adds: these, and the cases that have them.
        groups: dict[object, tuple[Bounds, dict[object, Case]]] = {}
        filled: set[int] = set()  # the keys of bounds that are their type's
        conjunctions = self._multiplied([], root.factors)
        self._spend(len(conjunctions) * len(common))
        for atoms in looking(conjunctions, 1024):
            bounds: Bounds = {}
            rows = common + tighten(bounds, atoms, outer, second)
            if any(contradictory(index, bounds, outer) for index in {key >> 1 for key in bounds}):
                continue
            if missing := self._left_to_type(unbounded, bounds, outer):
                filled.update(missing)
                unbounded = [key for key in unbounded if key not in filled]
            _, cases = groups.setdefault(frozenset(bounds.items()), (bounds, {}))
            case = distinct(rows)
            cases[case, tuple(row.arithmetic for row in case if row.arithmetic)] = case
        self._spend(2 * count * len(groups))
        queries = [
            Query(box(count, {**outer, **bounds}), tuple(cases.values()), second)
            for bounds, cases in groups.values()
        ]
        doubts = self._doubts_about({key >> 1 for key in filled})
        if not queries:
            doubts.append(
                "its conditions contradict each other whatever the network computes: nothing can "
                "be unsafe"
            )
        return Property(names.version, inputs, outputs, tuple(queries), tuple(doubts))

    def _left_to_type(self, unbounded: list[int], bounds: Bounds, outer: Bounds) -> list[int]:
        """The keys of bounds that only the type of their input gives. Fault where it gives none."""
        missing = [key for key in unbounded if key not in bounds]
        for key in missing:
            if key not in outer:
                side = "upper" if key & 1 else "lower"
                raise Fault(f"{self._names.input_name(key >> 1)} has no {side} bound")
        return missing

    def _doubts_about(self, filled: set[int]) -> list[str]:
        """A remark on the inputs that the file does not bound on both sides, if there are any."""
        if not filled:
            return []
        others = f" and {len(filled) - 1} more" if len(filled) > 1 else ""
        name = self._names.input_name(min(filled))
        return [
            f"the property does not bound {name}{others} on both sides: every finite float32 is "
            "allowed there"
        ]

    def _contradiction(self, bounds: Bounds) -> str:
        """What is contradictory in the bounds that hold for all inputs; empty if nothing is."""
        for key in bounds:
            if not key & 1 and contradictory(key >> 1, bounds, {}):
                (lower, _), (upper, _) = bounds[key], bounds[key + 1]
                name, crossed = self._names.input_name(key >> 1), lower > upper
                both = f"lower {decimal(lower)} {'>' if crossed else '='} upper {decimal(upper)}"
                excluded = "" if crossed else ", and that value is excluded"
                return f"contradictory bounds for {name}: {both}{excluded}"
        return ""
