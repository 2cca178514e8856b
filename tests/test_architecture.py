"""The plan of the house, read off the sources: who may import whom and what, and how large a room may get.

    floor 11  cli
    floor 10  train                          networks; meets the verifier at their ONNX files only
    floor 9   robustness                     many images
    floor 8   batch                          many properties
    floor 7   verify, inspect, report,       the whole story; what was read; what is printed;
              checker, workers               certificates are checked; processes
    floor 6   certificate, engine            what a verdict rests on, as a file; a model made ready for queries
    floor 5   search, check                  decide; replay
    floor 4   frontend                       files in, integer network out
    floor 3   network, runtime, propagate,   what a network means; onnxruntime; faster intervals;
              bounds                         the unsafe set and the dual
    floor 2   ops                            the integer operations
    floor 1   kernels, data                  NumPy or CuPy; labelled images
    floor 0   errors, property, options, result, deadline, files

An import goes to a lower floor or stays within its package, also when it stands inside a function; what only type
checkers read is free.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "qverify"
FLOORS = (
    ("errors", "property", "options", "result", "deadline", "files"),
    ("kernels", "data"),
    ("ops",),
    ("network", "runtime"),
    ("propagate",),
    ("bounds",),
    ("frontend",),
    ("search", "check"),
    ("certificate", "engine"),
    ("verify", "inspect", "report", "checker", "workers"),
    ("batch",),
    ("robustness",),
    ("train",),
    ("cli",),
    ("__main__",),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 450, 70

every_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.as_posix())


@functools.cache
def source(module: Path) -> str:
    return (PACKAGE / module).read_text(encoding="utf-8")


@functools.cache
def tree(module: Path) -> ast.Module:
    return ast.parse(source(module))


def dotted(module: Path) -> str:
    """qverify/ops/affine.py -> qverify.ops.affine; a package is named by its folder."""
    parts = module.with_suffix("").parts
    return ".".join(("qverify", *(parts[:-1] if parts[-1] == "__init__" else parts)))


NAMES = {dotted(module): module for module in MODULES}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    """Dotted names that are imported below `node`: at once, or also (`lazy`) when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module is not None, "relative imports hide the floors"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in NAMES else child.module
        elif not is_for_types(child) and (lazy or not isinstance(child, ast.FunctionDef)):
            yield from imports(child, lazy)


def unit_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


# -- floors and walls ----------------------------------------------------------------------------------------------------


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(name) for name in NAMES} - {""} == set(FLOOR)


@every_module
def test_imports_go_down(module: Path) -> None:
    own = unit_of(dotted(module))
    for name in imports(tree(module), lazy=True):
        other = unit_of(name)
        if name.split(".")[0] != "qverify" or other in ("", own):  # "": only the version comes from the package itself
            continue
        assert own in FLOOR and FLOOR[other] < FLOOR[own], f"{module} (floor {FLOOR[own]}) imports {name}"


def test_no_import_cycles() -> None:
    """Within packages too. (qverify.kernels loads qverify.kernels.gpu on demand, which is no cycle.)"""
    graph = {name: {n for n in imports(tree(NAMES[name]), lazy=False) if n in NAMES} - {"qverify"} for name in NAMES}
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
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
                assert module.name == "report.py", f"{module}:{node.lineno} takes {ast.unparse(node)}"


# -- sizes and manners ---------------------------------------------------------------------------------------------------


@every_module
def test_sizes(module: Path) -> None:
    count = len(source(module).splitlines())
    assert count <= FILE_LINES, f"{module} has {count} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{module}: {node.name} has {length} lines"


@every_module
def test_docstrings(module: Path) -> None:
    """Every module (but for empty package files) and every public function and class has one. A rule of the frontend
    may do without: `@lowers` says which op it reads."""
    body = tree(module).body
    assert not body or ast.get_docstring(tree(module)), f"{module} has no docstring"
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            rule = any(ast.unparse(decorator).startswith("lowers(") for decorator in node.decorator_list)
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
                    assert any(isinstance(n, ast.Raise) and n.exc is None for n in node.body), f"{place} swallows it"
                if "Exception" in names:
                    found.add((module.as_posix(), function.name))
                    assert "#" in source(module).splitlines()[node.lineno - 1], f"{place} does not say why"
    assert found == CATCH_ALL


# -- the repository ------------------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.$}-])/(?:home|root|work|mnt|media|Users|private)/\w|\b[A-Z]:\\+Users\b")
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
            assert not MACHINE_PATH.search(line), f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
