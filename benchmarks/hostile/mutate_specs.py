"""Changes of properties token by token, and a reader of its own that says of a point whether the
text calls it unsafe."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from benchmarks.hostile.mutation_bases import Rng

Tree = Any  # a word, or a list of trees
TOKEN = re.compile(r"[()]|[^\s();]+|;[^\n]*")  # a comment is one too
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WORDS = (
    *(
        "X_0",
        "X_1",
        "X_9",
        "Y_0",
        "Y_1",
        "Y_9",
        "Z_0",
        "X_00",
        "X_-1",
        "x_0",
        "Y_",
        "and",
        "or",
        "not",
        "<=",
        ">=",
        "<",
        ">",
    ),
    *(
        "=",
        "==",
        "!=",
        "+",
        "-",
        "*",
        "/",
        "assert",
        "declare-const",
        "Real",
        "Int",
        "Bool",
        "true",
        "false",
        "let",
        "=>",
    ),
    *(
        "0",
        "1",
        "-1",
        "0.25",
        "1e400",
        "1e-400",
        "1e99999999",
        "1/2",
        "nan",
        "inf",
        "0x1",
        "1_0",
        "١",
        "",
        "()",
        ")",
        "(",
    ),
    *(
        ";",
        '"',
        "|",
        "\x00",
        "\ufeff",
        "\u202e",
        "é",
        "\n;)\n",
        "9" * 500,
        "0." + "0" * 300 + "1",
        "-0.0",
        "+0.5",
        ".5",
        "5.",
    ),
)


def one(rng: Rng, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def tokens(text: str) -> list[str]:
    return [word for word in TOKEN.findall(text) if not word.startswith(";")]


def change(text: str, rng: Rng) -> bytes:
    """The text with a few tokens changed, or changed as a whole."""
    words = tokens(text)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 6]))):
        at = int(rng.integers(len(words)))
        numbers = [i for i, word in enumerate(words) if NUMBER.fullmatch(word)]
        match int(rng.choice([0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8])):
            case 0:
                words[at] = one(rng, WORDS)
            case 1:
                del words[at]
            case 2:
                words.insert(at, one(rng, [*WORDS, words[at]]))
            case 3:
                other = int(rng.integers(len(words)))
                words[at], words[other] = words[other], words[at]
            case 4 if numbers:
                near = one(rng, numbers)
                value = float(words[near])
                words[near] = repr(
                    value + float(rng.choice([0.125, -0.125, 0.01, -0.01, 1e-7, -1e-7, 1, -1]))
                )
            case 5:
                signs = [i for i, word in enumerate(words) if word in ("<=", ">=", "<", ">")]
                if signs:
                    words[one(rng, signs)] = one(rng, ["<=", ">=", "<", ">", "=", "=="])
            case 6:
                names = [i for i, word in enumerate(words) if re.fullmatch(r"[XY]_\d+", word)]
                words[one(rng, names)] = one(rng, ["X_0", "X_1", "Y_0", "Y_1", "Y_2"])
            case 7:
                start, stop = inner(words, at, rng)
                words[start:stop] = wrapped(words[start:stop], rng)
            case _:
                start, stop = whole(words, at)
                words[stop:stop] = words[start:stop]
        if not words:
            break
    result = " ".join(words)
    match int(rng.integers(40)):
        case 0:
            return gzip.compress(result.encode())[: int(rng.integers(1, 400))]
        case 1:
            return result.encode("utf-16")
        case 2:
            return result.encode() + rng.bytes(5)
        case 3:
            return result.encode()[: int(rng.integers(len(result) + 1))]
        case 4:
            depth = int(rng.choice([100, 9000, 200_000]))
            return (
                result + "(assert " + "(and " * depth + "(<= Y_0 1)" + ")" * depth + ")"
            ).encode()
        case 5:
            return gzip.compress(result.encode() + b" " * 2**24)
    return result.encode("utf-8", "replace")


def whole(words: list[str], at: int) -> tuple[int, int]:
    """From the start to behind the end of the form that begins at `at` or before."""
    while at and words[at] != "(":
        at -= 1
    depth = 0
    for stop in range(at, len(words)):
        depth += {"(": 1, ")": -1}.get(words[stop], 0)
        if depth <= 0:
            return at, stop + 1
    return at, len(words)


def inner(words: list[str], at: int, rng: Rng) -> tuple[int, int]:
    """A condition or a term, mostly."""
    heads = [
        i
        for i, word in enumerate(words[:-1])
        if word == "(" and words[i + 1] in ("<=", ">=", "<", ">", "-", "+", "and")
    ]
    return whole(words, one(rng, heads) if heads and rng.random() < 0.8 else at)


def wrapped(form: list[str], rng: Rng) -> list[str]:
    """A form in another one; a condition beside a similar one, or turned around."""
    if form[1:2] and form[1] in ("<=", ">=", "<", ">", "and", "or", "not"):
        other = ["<=", "X_0", repr(float(rng.choice([0.1, 0.125, 0.25, 0.4])))]
        head: list[str] = one(
            rng, [["and"], ["or"], ["not"], ["or", "(", *other, ")"], ["and", "(", *other, ")"]]
        )
    else:
        head = one(rng, [["+"], ["-"], ["*", "2"], ["+", "X_0"], ["-", "Y_0"], ["assert"], []])
    return ["(", *head, *form, ")"]


# -- a reader of its own ---------------------------------------------------------------------------


class Unclear(Exception):
    """The text is none that this reader understands."""


def parsed(data: bytes) -> tuple[list[Tree], set[str]]:
    """The assertions and the declared variables of a 1.0 property."""
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise Unclear from error
    words, stack = tokens(text), [list[Tree]()]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            if len(stack) < 2:
                raise Unclear
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    if len(stack) != 1:
        raise Unclear
    asserts, names = [], set[str]()
    for form in stack[0]:
        match form:
            case ["declare-const", str(name), "Real"]:
                names.add(name)
            case ["assert", tree]:
                asserts.append(tree)
            case _:
                raise Unclear
    return asserts, names


def truth(tree: Tree, values: dict[str, Fraction]) -> bool:
    """Whether a condition holds."""
    match tree:
        case ["and", *parts]:
            return all([truth(part, values) for part in parts])
        case ["or", *parts]:
            return any([truth(part, values) for part in parts])
        case ["not", part]:
            return not truth(part, values)
        case [("<=" | ">=" | "<" | ">" | "=" | "==") as sign, left, right]:
            a, b = number(left, values), number(right, values)
            relations: dict[str, Callable[[], bool]] = {
                "<=": lambda: a <= b,
                ">=": lambda: a >= b,
                "<": lambda: a < b,
                ">": lambda: a > b,
            }
            return relations.get(sign, lambda: a == b)()
    raise Unclear


def number(tree: Tree, values: dict[str, Fraction]) -> Fraction:
    """The value of a term."""
    match tree:
        case str(word) if word in values:
            return values[word]
        case str(word) if NUMBER.fullmatch(word) and len(word) < 50:
            if abs(int(re.split("[eE]", word + "e0")[1])) > 1000:
                raise Unclear
            return Fraction(word)
        case ["+", *parts] if parts:
            return sum((number(part, values) for part in parts), Fraction(0))
        case ["-", part]:
            return -number(part, values)
        case ["-", part, *parts] if parts:
            return number(part, values) - sum((number(own, values) for own in parts), Fraction(0))
        case ["*", *parts] if parts:
            result = Fraction(1)
            for part in parts:
                result *= number(part, values)
            return result
    raise Unclear
