"""The plan of the house, read off the sources: who imports whom, and how much a function holds.

`tests/floors.py` lists the floors. An import goes to a lower floor or stays within its package,
also when it stands inside a function or only type checkers read it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.floors import (
    FIGURE,
    FLOOR,
    MODULES,
    NAMES,
    REPOSITORY,
    dotted,
    figure,
    imports,
    source,
    tree,
    unit_of,
)

COMPLEXITY, LOCALS = 20, 26  # of a function: independent paths, and names to keep in mind

every_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.as_posix())


# -- floors and walls ------------------------------------------------------------------------------


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(name) for name in NAMES} - {""} == set(FLOOR)


@every_module
def test_imports_go_down(module: Path) -> None:
    unit = unit_of(dotted(module))
    for name in imports(tree(module), lazy=True):
        other = unit_of(name)
        # "": only the version comes from the package itself
        if name.split(".")[0] != "qverify" or unit == "" or other in ("", unit):
            continue
        assert unit in FLOOR and FLOOR[other] < FLOOR[unit], (
            f"{module} (floor {FLOOR[unit]}) imports {name}"
        )


def test_no_import_cycles() -> None:
    """Within packages too. qverify.kernels loads qverify.kernels.gpu on demand; that is allowed."""
    graph = {
        name: {n for n in imports(tree(NAMES[name]), lazy=False) if n in NAMES} - {"qverify"}
        for name in NAMES
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


WALLS = {
    "cupy": ("kernels/gpu.py",),
    "onnxruntime": ("runtime.py",),
    "onnx": ("frontend/", "runtime.py", "train/export.py"),
    "torch": ("train/",),
    "click": ("cli/",),
    "PIL": ("data.py",),
    "matplotlib": ("robustness/plot.py", "train/curves.py"),
}


@pytest.mark.parametrize("library", WALLS)
def test_a_library_is_imported_behind_its_wall_only(library: str) -> None:
    for module in MODULES:
        if library in {name.split(".")[0] for name in imports(tree(module), lazy=True)}:
            assert module.as_posix().startswith(WALLS[library]), f"{module} imports {library}"


def test_only_the_printer_prints() -> None:
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "print", f"{module}:{node.lineno} prints"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.stdout",
                "sys.stderr",
            ):
                assert module.name == "printer.py", (
                    f"{module}:{node.lineno} takes {ast.unparse(node)}"
                )


def test_the_figure_shows_these_floors() -> None:
    """But for numbers of lines, which change all the time: python -m tests.floors draws it anew."""
    drawn, now = (re.sub(r"[\d,]+ lines", "", text) for text in (FIGURE.read_text(), figure()))
    assert drawn == now, "python -m tests.floors"


# -- sizes and manners -----------------------------------------------------------------------------


BRANCHES = (
    *(ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension),
    *(ast.match_case, ast.Assert),
)


def complexity(function: ast.FunctionDef) -> int:
    """Cyclomatic complexity (McCabe, 1976): one more than the decisions, those of nested functions
    and comprehensions among them."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, BRANCHES):
            count += 1 + (len(node.ifs) if isinstance(node, ast.comprehension) else 0)
    return count


def locals_of(function: ast.FunctionDef) -> set[str]:
    """Names that a function binds, its arguments among them."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and is_stored(n)}
    return stored | {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}


def is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


@every_module
def test_a_function_fits_a_head(module: Path) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            paths, names = complexity(node), len(locals_of(node))
            assert paths <= COMPLEXITY, f"{module}: {node.name} has {paths} independent paths"
            assert names <= LOCALS, f"{module}: {node.name} binds {names} names"


@every_module
def test_docstrings(module: Path) -> None:
    """Every module (but for empty package files) and every public function and class has one. A
    rule of the frontend may do without: `@lowers` says which op it reads."""
    body = tree(module).body
    assert not body or ast.get_docstring(tree(module)), f"{module} has no docstring"
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            rule = any(
                ast.unparse(decorator).startswith("lowers(") for decorator in node.decorator_list
            )
            assert rule or ast.get_docstring(node), f"{module}: {node.name} has no docstring"


CATCH_ALL = {
    ("cli/__init__.py", "main"),  # the door: an unforeseen error becomes one line and exit code 4
    ("runtime.py", "_create"),  # onnxruntime raises its own classes, RuntimeError and others alike
    ("runtime.py", "graph_function"),  # the same, from nodes alone
    ("runtime.py", "call"),
    ("runtime.py", "compiled"),  # and from a graph of ours
    ("runtime.py", "evaluate"),
    ("runtime.py", "run"),
}


def test_nothing_else_catches_everything() -> None:
    found = set()
    for module in MODULES:
        for function in ast.walk(tree(module)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.ExceptHandler):
                    continue
                place = f"{module}:{node.lineno}"
                assert node.type is not None, f"{place}: a bare except"
                names = {ast.unparse(n) for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if "BaseException" in names:
                    assert any(isinstance(n, ast.Raise) and n.exc is None for n in node.body), (
                        f"{place} swallows it"
                    )
                if "Exception" in names:
                    found.add((module.as_posix(), function.name))
                    assert "#" in source(module).splitlines()[node.lineno - 1], (
                        f"{place} does not say why"
                    )
    assert found == CATCH_ALL


# -- the repository --------------------------------------------------------------------------------

MODULE = re.compile(r"`((?:qverify|tests|benchmarks|specs)/[\w/]+\.(?:py|cu)|[a-z]+/[\w/]+\.py)`")


def test_modules_that_are_named_in_prose_exist() -> None:
    for path in (p for p in text_files() if p.suffix == ".md" and p.name != "CHANGELOG.md"):
        for name in MODULE.findall(path.read_text(encoding="utf-8")):
            roots = (REPOSITORY, REPOSITORY / "qverify", path.parent)
            assert any((root / name).is_file() for root in roots), f"{path.name} names {name}"


MACHINE_PATH = re.compile(
    r"(?<![\w.$}-])/(?:home|root|work|mnt|media|Users|private)/\w|\b[A-Z]:\\+Users\b"
)
TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".csv", ".vnnlib", ""}


def text_files() -> Iterator[Path]:
    """The repository's own text files; not what tools leave beside them."""
    for top in REPOSITORY.iterdir():
        if top.is_file() and top.suffix in TEXT and top.name != ".git":
            yield top
        elif top.name in ("qverify", "tests", "specs", "benchmarks", ".ci", "docs"):
            yield from (path for path in top.rglob("*") if path.is_file() and path.suffix in TEXT)


def test_no_file_names_a_place_on_somebody_s_machine() -> None:
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not MACHINE_PATH.search(line), (
                f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
            )
