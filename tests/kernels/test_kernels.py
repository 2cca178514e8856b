"""The array machines, as far as a computer without a GPU can see them."""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qverify
from qverify import cli, kernels
from qverify.errors import DeviceError
from qverify.kernels import gpu, open_kernels
from tests.graphs import Graph, write
from tests.kernels.strict import open_strict

PACKAGE = Path(qverify.__file__).parent


class CudaError(Exception):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


def fake_cupy(count: Any) -> types.ModuleType:
    """A cupy whose driver counts devices by `count()`."""
    runtime = types.SimpleNamespace(
        getDeviceCount=count,
        CUDARuntimeError=CudaError,
        getDeviceProperties=lambda _: {"name": b"Test GPU"},
    )
    module = types.ModuleType("cupy")
    cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: types.SimpleNamespace(id=0))
    module.__dict__.update(__version__="14.0", cuda=cuda, float32=np.float32, matmul=np.matmul)
    module.__dict__.update(full=np.full, eye=np.eye)
    return module


def tf32(x: Any, y: Any) -> Any:
    """A product whose factors are cut to 11 bits, as TF32 does."""
    return np.matmul((x.view(np.int32) & -(1 << 13)).view(np.float32), y)


def no_driver() -> int:
    raise CudaError("cudaErrorNoDevice: no CUDA-capable device is detected")


@pytest.fixture(params=["no cupy", "no driver", "no device"])
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of having no GPU, with a word that the message holds."""
    fakes = {"no cupy": (None, "CuPy"), "no driver": (fake_cupy(no_driver), "driver")}
    module, word = fakes.get(request.param, (fake_cupy(lambda: 0), "none is visible"))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return word


def test_cuda_without_a_gpu_is_one_clear_line(no_gpu: str) -> None:
    with pytest.raises(DeviceError, match=no_gpu) as info:
        open_kernels("cuda")
    message = str(info.value)
    assert "--device cpu" in message and "\n" not in message


def test_auto_falls_back_to_the_cpu(no_gpu: str) -> None:
    assert open_kernels("auto").name == "cpu"


def test_auto_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: 1))
    for device in ("auto", "cuda"):
        machine = open_kernels(device)
        assert (machine.name, machine.description) == ("cuda", "CuPy 14.0 on Test GPU")


def test_a_gpu_that_rounds_products_to_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_cupy(lambda: 1)
    module.__dict__["matmul"] = tf32
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(DeviceError, match="TF32"):
        open_kernels("cuda")
    assert open_kernels("auto").name == "cpu"


def test_the_cpu_does_not_ask_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> kernels.Kernels:
        raise AssertionError("asked")

    monkeypatch.setattr(gpu, "open_cuda", never)
    assert open_kernels("cpu").description == f"NumPy {np.__version__}"


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(DeviceError, match="abacus"):
        open_kernels("abacus")


def test_the_command_says_it_in_one_line(no_gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    model = write(g.model(g.quantize(g.input((1, 1)), 1.0, np.array(0, np.uint8))), tmp_path / "m.onnx")
    spec = tmp_path / "p.vnnlib"
    spec.write_text("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))")
    assert cli.main([str(model), str(spec), "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qverify: error: --device cuda needs ") and err.count("\n") == 1 and no_gpu in err


# -- the CPU's kernels ---------------------------------------------------------------------------------------------------


def test_windows_are_all_windows() -> None:
    cpu = open_kernels("cpu")
    x = np.arange(2 * 3 * 7 * 6, dtype=np.float32).reshape(2, 3, 7, 6)
    view = cpu.windows(x, (3, 2), (2, 3), (2, 1))
    assert view.shape == (2, 3, 2, 2, 3, 2)
    for place in np.ndindex(*view.shape):
        n, c, i, j, a, b = place
        assert view[place] == x[n, c, 2 * i + 2 * a, 3 * j + b]


def test_scatter_add_adds_up_repeated_indices() -> None:
    target = np.zeros((2, 3), np.float32)
    open_kernels("cpu").scatter_add(target, np.array([0, 2, 0]), np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    assert target.tolist() == [[4, 0, 2], [10, 0, 5]]


def test_integers_become_the_nearest_float_with_ties_to_even() -> None:
    values = np.array([2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31)], np.int32)
    expected = [2.0**24, 2.0**24 + 4, -(2.0**24), 2.0**31, -(2.0**31)]
    assert open_kernels("cpu").as_float32(values).tolist() == expected


# -- the strict machine of tests/test_gpu.py -----------------------------------------------------------------------------


def test_the_strict_machine_keeps_host_and_device_apart() -> None:
    machine = open_strict()
    here, there = np.arange(3, dtype=np.int32), machine.asarray(np.arange(3, dtype=np.int32))
    assert machine.to_host(np.int32(1) << there + there).tolist() == [1, 4, 16]
    assert machine.to_host(there[machine.asarray(np.array([2, 0]))]).tolist() == [2, 0]
    for mixed in (
        lambda: there + here,
        lambda: here + there,
        lambda: there[here],
        lambda: machine.xp.take(here, there),
        lambda: machine.xp.concatenate([there, here]),
        lambda: np.flatnonzero(there),
        lambda: np.asarray(there),
    ):
        with pytest.raises(TypeError):
            mixed()


# -- what the code asks of an array module -------------------------------------------------------------------------------


def chain(node: ast.AST) -> list[str]:
    """The names of a.b.c; a call or a subscript in between ends it."""
    if isinstance(node, ast.Attribute):
        return [*chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def array_names() -> dict[str, str]:
    """Every name that the code written against `xp` uses -> a place where it does."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = chain(node) if isinstance(node, ast.Attribute) else []
            if "xp" in names[:-1]:
                rest = names[names.index("xp") + 1 :]
                found.setdefault(".".join(rest), f"{path.relative_to(PACKAGE.parent)}:{node.lineno}")  # type: ignore[attr-defined]
    return found


def lookup(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def test_the_names_are_found_at_all_and_are_numpy_s() -> None:
    names = array_names()
    assert {"take", "matmul", "add.at", "lib.stride_tricks.as_strided", "int32"} <= names.keys()
    for name in names.keys() - {"asnumpy"}:  # CuPy's way to the host
        lookup(np, name)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.filterwarnings("ignore")  # CuPy warns where it finds no CUDA
def test_every_array_name_exists_in_cupy() -> None:
    import cupy

    missing = []
    for name, place in array_names().items():
        try:
            lookup(cupy, name)
        except AttributeError:
            missing.append(f"{name} ({place})")
    assert not missing
