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
    module.__dict__.update(full=np.full, eye=np.eye, float64=np.float64, dtype=np.dtype)
    module.__dict__["ElementwiseKernel"] = lambda *_: None
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


def sliced(x: Any, y: Any) -> Any:
    """A product of stacks that keeps 32 bits of its factors."""
    kept = x.view(np.int64) & -(1 << 21) if x.ndim > 2 and x.dtype == np.float64 else None
    return np.matmul(x if kept is None else kept.view(np.float64), y)


def test_a_gpu_that_rounds_the_products_of_stacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = fake_cupy(lambda: 1)
    module.__dict__["matmul"] = sliced
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(DeviceError, match="float64 products are rounded"):
        open_kernels("cuda")


@pytest.mark.parametrize("name", gpu.EMULATED)
def test_emulated_products_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: 1))
    monkeypatch.setenv(name, "1")
    with pytest.raises(DeviceError, match=name):
        open_kernels("cuda")
    monkeypatch.setenv(name, "0")
    assert open_kernels("cuda").name == "cuda"


def test_the_cpu_does_not_ask_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> kernels.Kernels:
        raise AssertionError("asked")

    monkeypatch.setattr(gpu, "open_cuda", never)
    assert open_kernels("cpu").description == f"NumPy {np.__version__}"


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(DeviceError, match="abacus"):
        open_kernels("abacus")


def test_the_command_says_it_in_one_line(
    no_gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    g = Graph()
    model = write(
        g.model(g.quantize(g.input((1, 1)), 1.0, np.array(0, np.uint8))), tmp_path / "m.onnx"
    )
    spec = tmp_path / "p.vnnlib"
    spec.write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))"
    )
    assert cli.main([str(model), str(spec), "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err.startswith("qverify: error: --device cuda needs ")
        and err.count("\n") == 1
        and no_gpu in err
    )


# -- the CPU's kernels -----------------------------------------------------------------------------


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
    open_kernels("cpu").scatter_add(
        target, np.array([0, 2, 0]), np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    )
    assert target.tolist() == [[4, 0, 2], [10, 0, 5]]


def test_integers_become_the_nearest_float_with_ties_to_even() -> None:
    values = np.array([2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31)], np.int32)
    expected = [2.0**24, 2.0**24 + 4, -(2.0**24), 2.0**31, -(2.0**31)]
    assert open_kernels("cpu").as_float32(values).tolist() == expected


def test_products_of_stacks_with_one_matrix_are_those_of_matrices() -> None:
    cpu, x, weight = (
        open_kernels("cpu"),
        np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        np.ones((4, 5), np.float64),
    )
    assert np.array_equal(cpu.matmul(x, weight), np.matmul(x.astype(np.float64), weight))
    assert np.array_equal(
        cpu.matmul(x[:, :, 1:3], weight[:2]), np.matmul(x[:, :, 1:3].astype(np.float64), weight[:2])
    )


def test_whole_numbers_are_the_same_on_every_machine() -> None:
    values = np.array([0.5, 1.5, -2.5, 2.0**61, 2.0**62, -(2.0**70), np.inf, np.nan])
    expected = [0, 2, -2, 2**61, 0, 0, 0, 0]
    for machine in (open_kernels("cpu"), open_strict()):
        assert machine.to_host(machine.whole(machine.asarray(values))).tolist() == expected


# -- the strict machine of tests/test_gpu.py -------------------------------------------------------


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


def test_the_strict_machine_refuses_what_cupy_lacks_or_does_otherwise() -> None:
    machine = open_strict()
    xp, x, far = (
        machine.xp,
        machine.asarray(np.arange(6).reshape(2, 3)),
        machine.asarray(np.array([1e30, 0.5])),
    )
    for refused in (
        lambda: xp.searchsorted(x, x),
        lambda: xp.maximum.accumulate(x),
        lambda: xp.add.reduceat(x, 0),
        lambda: xp.add.at(x, 0, x),
        lambda: xp.take(x, x, mode="clip"),
        lambda: x.max(initial=0),
        lambda: x.sum(where=x > 1),
        lambda: x.argmax(axis=(0, 1)),
        lambda: xp.matmul(x, x.T),
        lambda: xp.rint(x),
        lambda: far.astype(np.int32),
        lambda: x[0].__setitem__(0, far),
        lambda: x.tolist(),
        lambda: x.__iadd__(far),
    ):
        with pytest.raises((TypeError, AttributeError, OverflowError, ValueError)):
            refused()


def test_the_strict_machine_flushes_subnormals_unless_asked_for_ieee() -> None:
    machine = open_strict()
    small = machine.asarray(np.array([1e-30, 1e-40], np.float32))
    for flushing in (
        lambda: small * np.float32(1e-10),
        lambda: np.float32(1e-10) * small,
        lambda: abs(small[1:]),
    ):
        assert machine.to_host(flushing())[-1] == 0
    kept = machine.ieee.multiply(small, machine.asarray(np.float32(1e-5)))
    assert (
        machine.to_host(kept).tolist()
        == (np.array([1e-30, 1e-40], np.float32) * np.float32(1e-5)).tolist()
    )
    # Moved, not computed.
    assert machine.to_host(machine.xp.take(small, machine.asarray(np.array([1]))))[0] > 0


# -- what the code asks of an array module ---------------------------------------------------------


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
            if isinstance(node, ast.Attribute) and "xp" in (names := chain(node))[:-1]:
                rest = names[names.index("xp") + 1 :]
                place = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
                found.setdefault(".".join(rest), place)
    return found


def lookup(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def test_the_names_are_found_at_all_and_are_numpy_s() -> None:
    names = array_names()
    assert {"take", "matmul", "add.at", "lib.stride_tricks.as_strided", "int64"} <= names.keys()
    cupys = {"asnumpy", "cuda", "cuda.Device", "ElementwiseKernel", "ReductionKernel"}
    for name in names.keys() - cupys:
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
