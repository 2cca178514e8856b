"""onnxruntime, for four jobs: to write the graph that it runs for a file; to compute constants,
tables and single nodes by its own arithmetic; to run graphs of ours; and to run the file itself.
The only module that imports it, when first needed."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from qverify.errors import ModelError, UsageError
from qverify.files import existing, is_packed, unpacked

MAX_BYTES = 1 << 31  # of a model; protobuf has no larger ones
# The oldest version on which the tests pass, but for ops that refuse it themselves.
OLDEST = (1, 30)
# The machines on which the rules were compared with the runtime at length.
MEASURED = ("x86_64", "amd64")


def _onnxruntime(purpose: str) -> Any:
    # Else the import writes a device id under the user's home.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs onnxruntime ({error}): pip install onnxruntime"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise UsageError(
            f"{purpose} needs onnxruntime, but the installed one is empty: reinstall onnxruntime"
        )
    if _release(onnxruntime) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} is too old: install {oldest} or newer"
        )
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _release(onnxruntime: Any) -> tuple[int, ...]:
    # 1.33rc1, 1.33.0.dev20261101 among them.
    return tuple(map(int, re.findall(r"\d+", onnxruntime.__version__)[:2]))


def release() -> tuple[int, ...]:
    """The installed onnxruntime's version, major and minor."""
    return _release(_onnxruntime("This"))


def machine() -> str:
    """The architecture of this machine's processor, as Python names it."""
    return platform.machine().lower() or "unknown"


def machine_warnings() -> tuple[str, ...]:
    """What to know of this machine where the rules were not tested on one like it."""
    if machine() in MEASURED:
        return ()
    return (
        f"the rules were tested on x86-64; on this machine ({machine()}) onnxruntime has other "
        "kernels, which may round QLinearAdd and QLinearMul otherwise. Its nodes were compared "
        "with the rules here, not all of them on every input",
    )


def available() -> bool:
    """Whether onnxruntime can be imported; nothing is loaded."""
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None


def version() -> str:
    """The installed onnxruntime's version."""
    return str(_onnxruntime("This").__version__)


def optimised_graph(
    path: Path, shapes: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """The graph that onnxruntime's CPU provider makes of the file at its default level: QDQ groups
    fused to integer ops, and layouts changed, which may reorder float additions. Only the blocked
    layout of float convolutions (NCHWc) is left out: it moves elements of float tensors, and a
    float convolution is refused anyway. `shapes` fixes those of inputs.

    Raises ModelError if onnxruntime refuses the file.
    """
    ort = _onnxruntime("Reading a model")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(target)
        _create(
            ort, _fixed(path, shapes or {}, options), options, f"'{path}'", ["NchwcTransformer"]
        )
        # What lies outside is beside the model still.
        fused = onnx.load(str(target), load_external_data=False)
    for tensor in fused.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external(tensor, path)
    return fused


def _fixed(path: Path, shapes: Mapping[str, Sequence[int]], options: Any) -> str | bytes:
    """What a session with `options` is made of: the file (its bytes, where it is packed), or what
    it holds with the shapes of some inputs fixed, as if it had been exported with them: axes of one
    name have one size everywhere."""
    path = existing(path)
    if not shapes:
        return unpacked(path, MAX_BYTES) if is_packed(path) else str(path)
    model = onnx.ModelProto.FromString(unpacked(path, MAX_BYTES))
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    sizes: dict[str, int] = {}
    for item in model.graph.input:
        shape = item.type.tensor_type.shape
        for k, size in enumerate(shapes.get(item.name, ())):
            dim = shape.dim[k] if k < len(shape.dim) else shape.dim.add()
            sizes |= {dim.dim_param: size} if dim.dim_param else {}
            dim.dim_value = size
    for item in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for dim in item.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return bytes(model.SerializeToString())


def load_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Read the data that a tensor of the model `path` keeps in a file beside it.

    ModelError where that fails.
    """
    where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if where and not (path.parent / where).is_file():
        raise ModelError(
            f"the data of its tensor '{tensor.name}' are in the file '{where}', which is not "
            "there: put it beside the model"
        )
    try:
        load_external_data_for_tensor(tensor, str(path.parent))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"the external data of its tensor '{tensor.name}' cannot be read: {error}"
        ) from None


def _create(
    ort: Any, source: str | bytes, options: Any, what: str, without: Sequence[str] = ()
) -> Any:
    try:
        providers = ["CPUExecutionProvider"]
        return ort.InferenceSession(
            source, options, providers=providers, disabled_optimizers=list(without) or None
        )
    except Exception as error:  # onnxruntime raises its own classes, RuntimeError and others alike
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot load {what}: {_said(error)}"
        ) from None


def _said(error: Exception) -> str:
    """An error of onnxruntime's on one line, without the parts that say nothing."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    return re.sub(r"/\S*\.(cc|h):\d+ .*?\) (?=\S)", "", text)[:300]


Function = Callable[[dict[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]]


def graph_function(
    what: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[npt.DTypeLike, Sequence[int] | None]],
    constants: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[str],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> Function:
    """Nodes as they stand, run by onnxruntime without optimisation on one thread, as a function
    from values of `inputs` (name: element type and shape, None for any shape) to the `outputs`. It
    raises ModelError, as this does, where onnxruntime refuses the nodes; `what` names them in the
    message."""
    ort = _onnxruntime("Reading a model")
    tensors = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    free = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape) in inputs.items()
    ]
    graph = helper.make_graph(
        nodes, "nodes", free, [onnx.ValueInfoProto(name=name) for name in outputs], tensors
    )
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = _create(ort, model.SerializeToString(), _as_written(ort), what)

    def call(feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        try:
            values: list[Any] = session.run(list(outputs), feeds)
        except Exception as error:  # an attribute that the kernel does not know, for instance
            raise ModelError(
                f"onnxruntime {ort.__version__} cannot run {what}: {_said(error)}"
            ) from None
        if not all(isinstance(value, np.ndarray) for value in values):
            raise ModelError(f"{what} gives something other than tensors, which is not supported")
        return values

    return call


def node_function(
    node: onnx.NodeProto,
    constants: dict[str, npt.NDArray[Any]],
    dtype: npt.DTypeLike,
    opsets: list[onnx.OperatorSetIdProto],
) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """One node alone, as a function of its first input (of any shape) to its first output."""
    name, what = node.input[0], f"the node '{node.name}' ({node.op_type})"
    function = graph_function(
        what, [node], {name: (dtype, None)}, constants, node.output[:1], opsets
    )
    return lambda x: function({name: x})[0]


def constant_node(
    node: onnx.NodeProto,
    inputs: Sequence[npt.NDArray[Any] | None],
    stored: Sequence[bool],
    opsets: list[onnx.OperatorSetIdProto],
) -> tuple[npt.NDArray[Any], ...]:
    """What a node gives for constant inputs (None: absent).

    An array for every output, empty for one that is absent.

    Inputs that the graph stores are given as it stores them, those that other nodes compute as
    values: a kernel may rearrange stored weights, and then add in another order.
    """
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[:]
    alone.input.extend(f"i{k}" if value is not None else "" for k, value in enumerate(inputs))
    present = {f"i{k}": (value, stored[k]) for k, value in enumerate(inputs) if value is not None}
    constants = {name: value for name, (value, is_stored) in present.items() if is_stored}
    feeds = {name: aligned(value) for name, (value, is_stored) in present.items() if not is_stored}
    free = {name: (value.dtype, value.shape) for name, value in feeds.items()}
    names = [name for name in node.output if name]
    what = f"the node '{node.name}' ({node.op_type})"
    found = graph_function(what, [alone], free, constants, names, opsets)(feeds)
    given = dict(zip(names, found, strict=True))
    return tuple(given.get(name, np.zeros(0, np.float32)) for name in node.output)


def aligned(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that begins where the runtime's tensors begin.

    Its sums of floats start at aligned addresses.
    """
    room = np.empty(value.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


def _as_written(ort: Any) -> Any:
    """Options of a session that runs a graph node by node as it is written, on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def saturates() -> bool:
    """Whether onnxruntime's uint8 x int8 products saturate at int16 here (x86 without VNNI)."""
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    weight = np.full((64, 16), 127, np.int8)
    product = node_function(node, {"b": weight}, np.uint8, [helper.make_opsetid("", 13)])
    return bool((product(np.full((4, 64), 255, np.uint8)) != 255 * 127 * 64).any())


class IntegerGraph:
    """A graph of ours under construction. Values have a free first axis, the batch."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int]) -> str:
        """A new input [batch, *shape] of that name."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._inputs.append(helper.make_tensor_value_info(name, element, [None, *shape]))
        return name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """The name of a constant."""
        name = f"c{len(self._constants)}"
        self._constants.append(
            numpy_helper.from_array(
                np.ascontiguousarray(value, dtype).reshape(np.shape(value)), name
            )
        )
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """The names of a new node's outputs. QGemm, QLinearAdd and QLinearConv are Microsoft's."""
        names = [f"n{len(self._nodes)}_{k}" for k in range(outputs)]
        domain = "com.microsoft" if op in ("QGemm", "QLinearAdd", "QLinearConv") else ""
        self._nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names

    def compiled(
        self, outputs: Sequence[str], exactly: bool
    ) -> Callable[[dict[str, npt.NDArray[Any]]], list[Any]]:
        """The graph as a function of its inputs, run as written (no optimisation) on one thread.

        With `exactly`, onnxruntime is asked for products that do not saturate on x86 without VNNI,
        at some cost. Raises ModelError if onnxruntime refuses the graph, and so does the function.
        """
        ort = _onnxruntime("Interval propagation")
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self._nodes, "bounds", self._inputs, results, self._constants)
        opsets = [helper.make_opsetid("", 19), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = _as_written(ort)
        if exactly:
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = _create(ort, model.SerializeToString(), options, "a graph of bounds")

        def evaluate(inputs: dict[str, npt.NDArray[Any]]) -> list[Any]:
            try:
                values: list[Any] = session.run(None, inputs)
            except Exception as error:  # such as a lack of memory; the caller has another way
                raise ModelError(
                    f"onnxruntime {ort.__version__} cannot run a graph of bounds: {_said(error)}"
                ) from None
            return values

        return evaluate


class Session:
    """The user's file in onnxruntime with default options on the CPU: what a counterexample is
    replayed on. `as_written` leaves out all that changes arithmetic, but folds constants: a QLinear
    op whose zero point is no stored constant ends the process without a word. `shapes` fixes those
    of inputs, as in `optimised_graph`."""

    def __init__(
        self,
        path: Path,
        as_written: bool = False,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        ort = _onnxruntime("Running the model")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        without = ["DoubleQDQPairsRemover"] if as_written else []
        self._session = _create(
            ort, _fixed(path, shapes or {}, options), options, f"'{path}'", without
        )
        self._path = path
        self.version = str(ort.__version__)
        self.input_names = [item.name for item in self._session.get_inputs()]

    def run(self, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The graph's outputs, in its order, for its inputs, in its order.

        ModelError where onnxruntime loads the file but cannot run it.
        """
        feeds = dict(zip(self.input_names, inputs, strict=True))
        try:
            return [np.asarray(value) for value in self._session.run(None, feeds)]
        except Exception as error:  # some kernels look at their inputs only now
            raise ModelError(
                f"onnxruntime {self.version} cannot run '{self._path}': {_said(error)}"
            ) from None
