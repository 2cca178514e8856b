"""The floors of the house: which unit stands on which, and the figure that shows it.

    python -m tests.floors        writes specs/floors.svg

A unit is a module or a package of `qverify`. An import goes to a lower floor or stays within its
unit. Imports that only type checkers read count too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "qverify"
FIGURE = REPOSITORY / "specs" / "floors.svg"

# From the bottom up: the units of a floor, and what they are there for.
FLOORS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("errors",), "every error that is raised on purpose"),
    (("property", "options", "result", "deadline"), "the words that all share"),
    (("files", "formats", "printer", "kernels"), "files and output; NumPy or CuPy"),
    (("vnnlib", "data", "ops"), "properties in; labelled images in; the integer operations"),
    (("network", "runtime"), "what a network means; onnxruntime"),
    (("propagate",), "the same intervals, faster"),
    (("frontend", "bounds"), "ONNX in, integer network out; bounds of the unsafe set"),
    (("boundary",), "where floats and integers meet: inputs, outputs, readings"),
    (("search", "replay"), "decide; replay a counterexample"),
    (("certificate", "engine"), "what a verdict rests on; a model made ready for queries"),
    (("verification", "inspect", "checker", "workers"), "the whole story; certificates; processes"),
    (("batch",), "many properties"),
    (("robustness",), "many images"),
    (("train",), "trains networks, which the verifier meets as ONNX files"),
    (("cli",), "the command line"),
    (("__main__",), "python -m qverify"),
)
FLOOR = {unit: floor for floor, (units, _) in enumerate(FLOORS) for unit in units}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@functools.cache
def source(module: Path) -> str:
    """The text of a module, given by its path in the package."""
    return (PACKAGE / module).read_text(encoding="utf-8")


@functools.cache
def tree(module: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(source(module))


def dotted(module: Path) -> str:
    """qverify/ops/affine.py -> qverify.ops.affine; a package is named by its folder."""
    parts = module.with_suffix("").parts
    return ".".join(("qverify", *(parts[:-1] if parts[-1] == "__init__" else parts)))


NAMES = {dotted(module): module for module in MODULES}


def unit_of(name: str) -> str:
    """The unit of a dotted name; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    """Dotted names that are imported below `node`: at the top, or also (`lazy`) when a function is
    called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module is not None, "relative imports hide the floors"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in NAMES else child.module
        elif lazy or not isinstance(child, ast.FunctionDef):
            yield from imports(child, lazy)


def edges() -> dict[str, set[str]]:
    """unit -> the units that it imports."""
    found: dict[str, set[str]] = {unit: set() for unit in FLOOR}
    for name, module in NAMES.items():
        for other in imports(tree(module), lazy=True):
            if other.split(".")[0] == "qverify" and unit_of(name):
                found[unit_of(name)].add(unit_of(other))
    return {unit: others - {unit, ""} for unit, others in found.items()}


def _direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the edges that a longer way makes unnecessary."""

    @functools.cache
    def below(unit: str) -> frozenset[str]:
        return frozenset(graph[unit]).union(*(below(other) for other in graph[unit]))

    return {
        unit: {o for o in others if not any(o in below(x) for x in others)}
        for unit, others in graph.items()
    }


# What nearly everything imports: arrows to these would hide the others.
COMMON = {"errors", "property", "options", "result", "deadline", "files", "formats", "printer"}


def figure() -> str:
    """The floors as SVG: a row for each, an arrow for every import that no longer way implies, but
    for imports of what is common to all."""
    width, row, box, left = 1120, 64, 112, 330
    lines = {unit: 0 for unit in FLOOR}
    for name, module in NAMES.items():
        if unit_of(name):
            lines[unit_of(name)] += len(source(module).splitlines())
    height = row * len(FLOORS) + 40
    at: dict[str, tuple[int, int]] = {}
    for floor, (units, _) in enumerate(FLOORS):
        room = (width - left) // len(units)
        for k, unit in enumerate(units):
            at[unit] = left + room * k + room // 2, row * (len(FLOORS) - 1 - floor) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#8a8f98"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for floor, (_, why) in enumerate(FLOORS):
        y = row * (len(FLOORS) - 1 - floor) + 36
        if floor % 2:
            parts.append(f'<rect y="{y - 32}" width="{width}" height="{row}" fill="#f4f6f9"/>')
        parts.append(f'<text x="12" y="{y + 4}" fill="#555"><tspan>{floor}</tspan>')
        parts.append(f'<tspan x="38">{why}</tspan></text>')
    for unit, others in _direct(edges()).items():
        x, y = at[unit]
        for other in sorted(others - COMMON):
            to, deep = at[other]
            parts.append(
                f'<line x1="{x}" y1="{y + 18}" x2="{to}" y2="{deep - 18}" stroke="#8a8f98" '
                'stroke-width="1" marker-end="url(#tip)"/>'
            )
    for unit, (x, y) in at.items():
        parts.append(
            f'<rect x="{x - box // 2}" y="{y - 18}" width="{box}" height="36" rx="5" '
            f'fill="#e8f0fe" stroke="#4472c4"/><text x="{x}" y="{y - 2}" text-anchor="middle">'
            f'{unit}</text><text x="{x}" y="{y + 12}" text-anchor="middle" font-size="10" '
            f'fill="#666">{round(lines[unit], -2):,} lines</text>'
        )
    note = f"Not drawn: what a longer way implies, and imports of {', '.join(sorted(COMMON))}."
    parts.append(f'<text x="12" y="{height - 8}" font-size="11" fill="#555">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
