"""The hand-made cases that once failed, each with what is right.

    python benchmarks/hostile/cases.py FOLDER [--only TEXT] [--oracle]

FOLDER holds `sound`, `spec`, `time` and `reader`. Every case is run through the command line, in a
process of its own, and becomes a row: the case, what is right, what came, the verdict (ok, WRONG or
missing), seconds of CPU and of the clock. The exit code is 1 unless every row is ok. What is right
stands below with a reason; with `--oracle`, onnxruntime is asked as well, by brute force
(`oracle.py`), and a disagreement is shown as a fault of this script.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.hostile import oracle

LIMIT = 60.0  # seconds for a property that is small enough to be decided at once
PATIENCE = 400.0  # seconds of the clock after which a run is killed
WITHOUT = (
    "import sys; sys.modules['onnxruntime'] = None; from qverify.cli import main; sys.exit(main())"
)
VERDICTS = ("sat", "unsat", "unknown", "timeout")
EXIT_CODES = {"unsat": 0, "sat": 1, "unknown": 3, "timeout": 3}


# -- one run of the command ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished process."""

    code: int
    out: str
    err: str
    cpu: float
    wall: float
    memory: int  # bytes at most resident

    @property
    def verdict(self) -> str:
        word = self.out.split("\n", 1)[0].strip()
        return (
            word
            if word in VERDICTS
            else "accepted"
            if word.startswith("accepted")
            else f"exit {self.code}"
        )

    @property
    def said(self) -> str:
        """The last line for people."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run(arguments: list[str], folder: Path, without_runtime: bool = False) -> Run:
    """The command with these arguments, in `folder`."""
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        *(("-c", WITHOUT) if without_runtime else ("-m", "qverify")),
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "400"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        child = os.fork()
        if child == 0:  # pragma: no cover
            os.chdir(folder)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.execve(command[0], command, environment)
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if time.perf_counter() - begin > PATIENCE:
                os.kill(child, 9)
            time.sleep(0.02)
        wall = time.perf_counter() - begin
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        said, complained = texts
    code = os.waitstatus_to_exitcode(status)
    return Run(
        code, said, complained, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024
    )


# -- what is right ---------------------------------------------------------------------------------

Judge = Callable[["Case", Path, Run], str]  # "" if the run is right, else what is wrong


@dataclass(frozen=True)
class Case:
    """A run and what is right about it. `files` are the model and the property, where brute force
    can decide."""

    name: str
    arguments: list[str]
    right: str
    reason: str
    judge: Judge
    without_runtime: bool = False
    files: tuple[str, str] | None = None
    # What is run first, in the folder.
    before: Callable[[Path], None] | None = field(default=None, compare=False)

    @property
    def folder(self) -> str:
        return self.name.split(":")[0]


def one_line(r: Run, *words: str, never: tuple[str, ...] = ()) -> str:
    """A refusal: exit code 2, nothing on standard output, one line that holds every word ("a|b":
    either) beside the names of files."""
    if r.code != 2:
        return f"exit code {r.code} instead of 2"
    if r.out.strip():
        return "a refusal on standard output"
    lines = [line for line in r.err.splitlines() if "error:" in line]
    if len(lines) != 1:
        return f"{len(lines)} lines of error instead of one"
    text = re.sub(r"[\w./-]+\.onnx\b", "", r.err).lower()
    lacking = [word for word in words if not any(w.lower() in text for w in word.split("|"))]
    if lacking:
        return f"the message lacks {', '.join(repr(w) for w in lacking)}"
    wrong = [word for word in never if word.lower() in text]
    return f"the message says {wrong[0]!r}" if wrong else ""


def verdict(
    name: str, right: str, reason: str, model: str, spec: str, refused: tuple[str, ...] = ()
) -> Case:
    """A property that is decided, or (with `refused`) a model that is refused in these words."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        if r.code == 2 and refused:
            return one_line(r, *refused)
        if r.verdict != right:
            return f"{r.verdict} instead of {right}"
        if min(r.wall, r.cpu) > LIMIT + 2:
            return f"the limit of {LIMIT:g} s was overrun"
        if r.code != EXIT_CODES[right]:
            return f"exit code {r.code} with the verdict {right}"
        if right == "sat":
            fault = oracle.witness_fault(
                folder / model, oracle.read_spec(folder / spec), r.out.split("\n", 1)[1]
            )
            return f"a wrong counterexample: {fault}" if fault else ""
        return ""

    words = right + (f", or a refusal with {' and '.join(refused)}" if refused else "")
    given = [model, spec, "--timeout", f"{LIMIT:g}"]
    return Case(
        name, given, words, reason, judge, files=None if "decimal 0" in reason else (model, spec)
    )


def needs_runtime(name: str, model: str, spec: str) -> Case:
    def judge(case: Case, folder: Path, r: Run) -> str:
        return one_line(r, "onnxruntime", "install")

    return Case(
        f"{name} without onnxruntime",
        [model, spec],
        "a line that says to install onnxruntime",
        "what is verified is what onnxruntime computes; there is one way of reading, through it",
        judge,
        without_runtime=True,
    )


def refused(
    name: str, reason: str, arguments: list[str], *words: str, never: tuple[str, ...] = ()
) -> Case:
    def judge(case: Case, folder: Path, r: Run) -> str:
        return one_line(r, *words, never=never)

    says = "one line with " + ", ".join(words) + ("; without " + ", ".join(never) if never else "")
    return Case(name, arguments, says, reason, judge)


def loads(name: str, reason: str, arguments: list[str], *words: str) -> Case:
    """`inspect` shows the network, and what it prints holds every word ("a|b": either)."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        if r.code != 0:
            return f"refused: {r.said}"
        text = (r.out + r.err).lower()
        lacking = [word for word in words if not any(w in text for w in word.lower().split("|"))]
        return f"inspect does not say {', '.join(lacking)}" if lacking else ""

    return Case(
        name,
        arguments,
        "loads" + (", and says " + ", ".join(words) if words else ""),
        reason,
        judge,
    )


def loads_or(
    name: str, reason: str, arguments: list[str], *words: str, never: tuple[str, ...] = ()
) -> Case:
    """`inspect` shows the network, or refuses it in these words."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        return "" if r.code == 0 else one_line(r, *words, never=never)

    return Case(name, arguments, "loads, or one line with " + ", ".join(words), reason, judge)


def in_time(
    name: str,
    limit: float,
    model: str,
    spec: str,
    rights: tuple[str, ...],
    cpu: float | None = None,
) -> Case:
    """A verdict (one of `rights`) within the limit; `cpu`: at most so many seconds of CPU, loading
    included.

    A limit is overrun by at most max(1 s, 2 %). On a busy machine the clock says more than the
    program did, so the smaller of clock and CPU time counts, and where other programs share the
    processor half a second is allowed for starting up.
    """

    def judge(case: Case, folder: Path, r: Run) -> str:
        if r.verdict not in rights:
            return f"{r.verdict} instead of {' or '.join(rights)}"
        over = (
            min(r.wall, r.cpu)
            - limit
            - max(1.0, 0.02 * limit)
            - (0.5 if os.getloadavg()[0] > 2 else 0.0)
        )
        if over > 0:
            return f"the limit of {limit:g} s was overrun by {min(r.wall, r.cpu) - limit:.1f} s"
        if cpu is not None and r.cpu > cpu:
            return f"{r.cpu:.1f} s of CPU instead of {cpu:g}"
        if r.verdict == "sat":
            fault = oracle.witness_fault(
                folder / model, oracle.read_spec(folder / spec), r.out.split("\n", 1)[1]
            )
            return f"a wrong counterexample: {fault}" if fault else ""
        return ""

    says = f"{' or '.join(rights)} within {limit:g} s" + (
        f", {cpu:g} s of CPU" if cpu is not None else ""
    )
    return Case(
        name, [model, spec, "--timeout", f"{limit:g}"], says, "a limit holds in every phase", judge
    )


def rejected(name: str, reason: str, arguments: list[str], memory: int, cpu: float) -> Case:
    """`check` rejects a certificate, within so many MB and seconds of CPU."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        if any(line.startswith("accepted") for line in (r.out + "\n" + r.err).splitlines()):
            return "a line that begins with 'accepted'"
        if r.code not in (1, 2):
            return f"exit code {r.code}"
        if r.memory > memory * 2**20:
            return f"{r.memory >> 20} MB instead of {memory}"
        return f"{r.cpu:.1f} s of CPU instead of {cpu:g}" if r.cpu > cpu else ""

    return Case(name, arguments, f"rejected, within {memory} MB and {cpu:g} s", reason, judge)


# -- the cases -------------------------------------------------------------------------------------


def sound() -> list[Case]:
    code = "by onnxruntime on the one code vector of the box"
    direct = [
        verdict(
            "sound/k1: add",
            "sat",
            f"a float Add of codes is no QLinearAdd; {code}",
            "add.onnx",
            "add.vnnlib",
        ),
        verdict(
            "sound/k1: mul",
            "sat",
            f"a float Mul of codes is no QLinearMul; {code}",
            "mul.onnx",
            "mul.vnnlib",
        ),
        *(
            verdict(
                f"sound/k2: {name}",
                "sat",
                f"QLinearAdd broadcasts in the runtime's layout; {code}",
                *pair(name),
            )
            for name in ("slice", "constnode", "two")
        ),
        verdict(
            "sound/k7: direct",
            "sat",
            "output_dtype rounds to float16",
            *pair("direct"),
            refused=("output_dtype",),
        ),
        verdict(
            "sound/k8: direct",
            "sat",
            "SAME padding begins at element 1",
            *pair("direct"),
            refused=("auto_pad|MaxPool|QLinearConv|QLinearAveragePool",),
        ),
    ]
    constants = [
        verdict(
            f"sound/k3: {name}",
            "sat",
            f"the constant is the runtime's own {name}; {code}",
            *pair(name),
        )
        for name in ("tanh", "exp", "erf")
    ] + [
        verdict(
            f"sound/k3b: {name}",
            right,
            f"a constant QDQ branch is the runtime's; {code}",
            f"{name}.onnx",
            "p.vnnlib",
        )
        for name, right in (("m", "sat"), ("add", "unsat"), ("conv", "unsat"), ("matmul", "unsat"))
    ]
    nodes = [
        verdict(
            "sound/k7: m", "sat", "output_dtype rounds to float16", *mp, refused=("output_dtype",)
        ),
        verdict(
            "sound/k10: m",
            "sat",
            "QLinearSoftmax's default axis is -1 in the runtime",
            *mp,
            refused=("axis|QLinearSoftmax",),
        ),
        verdict(
            "sound/k12: m",
            "sat",
            "ReduceMean adds in the runtime's order",
            *mp,
            refused=("ReduceMean",),
        ),
        *(
            verdict(
                f"sound/k8: {name}",
                "sat",
                "SAME padding is the runtime's",
                *pair(name),
                refused=("auto_pad|MaxPool|QLinearConv|QLinearAveragePool",),
            )
            for name in ("average", "conv", "dilated", "hidden")
        ),
        *(
            refused(
                f"sound/k4: {n}",
                "a random node is no function",
                [f"{n}.onnx", f"{n}.vnnlib"],
                "RandomNormal",
            )
            for n in ("normal", "normalseed")
        ),
    ]
    readings = [
        verdict("sound/c1: m", "unsat", "Y_0 + Y_1 >= 300 and <= 299.5 contradict each other", *mp),
        verdict(
            "sound/c4: m",
            "sat",
            "the first disjunct holds no float32 and is empty; the second one is met",
            *mp,
        ),
        verdict(
            "sound/k6: p_unsat",
            "unknown",
            "X = 0.1 holds as a decimal, not as a float32",
            "m.onnx",
            "p_unsat.vnnlib",
        ),
        verdict(
            "sound/k6: p_sat",
            "unknown",
            "X = 0.1 holds as a float32, not as a decimal",
            "m.onnx",
            "p_sat.vnnlib",
        ),
        verdict(
            "sound/k6: p_mid",
            "unknown",
            "only the decimal 0.3 holds; no float32 does",
            "m.onnx",
            "p_mid.vnnlib",
        ),
        verdict("sound/n1: m", "unknown", "X = 0.1 holds as a float32, not as a decimal", *mp),
    ]
    direct += [
        needs_runtime("sound/k1: add", *pair("add")),
        needs_runtime("sound/k8: direct", *pair("direct")),
    ]
    about = "a file that is about k1/add"
    pair1 = ["../k1/add.onnx", "../k1/add.vnnlib"]
    certificates = [
        own_certificate(),
        rejected(
            "sound/d1: bomb", "200 MB in 197 KB of zip", ["check", *pair1, "bomb.zip"], 700, 10
        ),
        rejected(
            "sound/d2: chain",
            "8,000 cuts, one below the other",
            ["check", *pair1, "chain.zip"],
            700,
            10,
        ),
        rejected("sound/n2: inject", about, ["check", *pair1, "inject.zip"], 700, 10),
        rejected("sound/n2: surrogate", about, ["check", *pair1, "surrogate.zip"], 700, 10),
        other_weights(),
        other_rows(),
    ]
    return direct + constants + nodes + readings + certificates


def pair(name: str) -> tuple[str, str]:
    return f"{name}.onnx", f"{name}.vnnlib"


mp = ("m.onnx", "p.vnnlib")


def own_certificate() -> Case:
    def before(folder: Path) -> None:
        run(["m.onnx", "p.vnnlib", "--certificate", "own.zip"], folder)

    def judge(case: Case, folder: Path, r: Run) -> str:
        if not (
            folder / "own.zip"
        ).exists():  # where there can be none, that is said when one is asked for
            return one_line(
                run(["m.onnx", "p.vnnlib", "--certificate", "own.zip"], folder), "certificate"
            )
        return (
            ""
            if r.code == 0 and r.out.startswith("accepted")
            else f"{r.verdict}: {r.out.strip() or r.said}"
        )

    return Case(
        "sound/c2: own",
        ["check", "m.onnx", "p.vnnlib", "own.zip"],
        "accepted, or refused when asked for",
        "own certificates are accepted; where conditions mix inputs and outputs there may be none",
        judge,
        before=before,
    )


def other_weights() -> Case:
    """A certificate about one w.bin, checked with another."""

    def before(folder: Path) -> None:
        run(["m.onnx", "p.vnnlib", "--certificate", "own.zip"], folder)
        (folder / "w.bin").chmod(0o644)
        (folder / "w.bin").write_bytes(bytes([1, 0, 0, 1]))

    def judge(case: Case, folder: Path, r: Run) -> str:
        if not (folder / "own.zip").exists():
            return "no certificate was written"
        if r.out.startswith("accepted"):
            return "accepted for other weights"
        return (
            ""
            if r.code in (1, 2) and "another model" in r.out + r.err
            else f"{r.verdict}: {r.out.strip() or r.said}"
        )

    return Case(
        "sound/n3: other weights",
        ["check", "m.onnx", "p.vnnlib", "own.zip"],
        "rejected: another model",
        "the hash covers external data of a Constant's attribute",
        judge,
        before=before,
    )


def other_rows() -> Case:
    """Rows of one w.bin, resumed with another."""
    command = ["robustness", "m.onnx", "d.npz", "--eps", "1", "--results", "rows.csv"]

    def before(folder: Path) -> None:
        run(command, folder)
        (folder / "w.bin").chmod(0o644)
        (folder / "w.bin").write_bytes(bytes([1, 0, 0, 1]))

    def judge(case: Case, folder: Path, r: Run) -> str:
        if not (folder / "rows.csv").exists():
            return f"no rows were written: {r.said}"
        if r.code == 2 and re.search("another|other", r.err):
            return ""  # the rows are another model's, and the command says so
        (folder / "rows.csv").unlink()
        fresh = run(command, folder)
        table, own = (re.findall(r"^\s+1\s+35\s.*?(?=\s[\d.]+$)", t.out, re.M) for t in (fresh, r))
        return "" if table and table == own else f"resumed: {own}, from scratch: {table}"

    return Case(
        "sound/k5: other rows",
        command,
        "as from scratch, or refused",
        "the hash covers external data",
        judge,
        before=before,
    )


def spec() -> list[Case]:
    two = "thirds.onnx"  # any network with an input and an output of shape [1, 2]
    grammar = "not supported, and said so"
    batch = "the property's batch is 2, the model's N; outputs are equal at a corner"
    return [
        verdict(
            "spec: band_empty",
            "unsat",
            "x - y >= 0.00001 and <= 0.000009 contradict each other",
            *pair("band_empty"),
        ),
        verdict(
            "spec: contradictory2",
            "unsat",
            "x - y > 0 and <= 0 contradict each other",
            *pair("contradictory2"),
        ),
        verdict(
            "spec: order3", "unsat", "x <= y <= z <= x - 0.001 has no solution", *pair("order3")
        ),
        verdict(
            "spec: thirds",
            "unknown",
            "3x = y + 0.1 has decimal solutions (0.1, 0.2), but no float32 ones",
            *pair("thirds"),
        ),
        verdict("spec: empty_box", "unsat", "X >= 2 and <= 1", two, "empty_box.vnnlib"),
        verdict(
            "spec: unbounded",
            "sat",
            "a float32 has ends of its own; by onnxruntime at some input",
            two,
            "unbounded.vnnlib",
        ),
        verdict(
            "spec: pretty",
            "sat",
            "white space before an index is the reference library's output",
            two,
            "pretty.vnnlib",
        ),
        verdict(
            "spec: shape5",
            "sat",
            "[5] and [1, 1, 1, 5] hold the same elements",
            "m1115.onnx",
            "shape5_for_1115.vnnlib",
        ),
        answered(
            "spec: dynamic_batch_2", batch, "batch.onnx", "dynamic_batch_2.vnnlib", "sat", "batch"
        ),
        answered(
            "spec: dynamic_batch_2 --shape",
            batch,
            "batch.onnx",
            "dynamic_batch_2.vnnlib",
            "sat",
            more=("--shape", "X=2,2"),
        ),
        packed("spec: only_gz", "only_gz.onnx"),
        packed("spec: only_gz.gz", "only_gz.onnx.gz"),
        verdict(
            "spec: tie_v1",
            "unknown",
            "0.58999997... holds as doubles, not exactly",
            "flt.onnx",
            "tie_v1_unsat.vnnlib",
        ),
        verdict(
            "spec: tie_v2_unsat",
            "unknown",
            "0.59 holds in float32, not exactly",
            "flt.onnx",
            "tie_v2_unsat.vnnlib",
        ),
        verdict(
            "spec: tie_v2_sat",
            "unknown",
            "-0.31 holds exactly, not in float32",
            "flt.onnx",
            "tie_v2_sat.vnnlib",
        ),
        refused("spec: equal_to", grammar, [two, "equal_to.vnnlib"], "equal-to|network"),
        answered(
            "spec: hidden_unused", "a hidden node", two, "hidden_unused.vnnlib", "sat", "hidden"
        ),
        refused("spec: infix", grammar, [two, "infix.vnnlib"], "infix.vnnlib: line|infix.vnnlib:"),
        answered(
            "spec: initialized", "version 2.1", two, "initialized.vnnlib", "sat", "initialized|2.1"
        ),
        refused("spec: poly", grammar, [two, "poly.vnnlib"], "linear|product|poly"),
    ]


def answered(
    name: str,
    reason: str,
    model: str,
    spec: str,
    right: str,
    *words: str,
    more: tuple[str, ...] = (),
) -> Case:
    """The verdict, or (if there are any) a refusal in these words."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        if r.code == 2 and words:
            return one_line(r, *words)
        return "" if r.verdict == right else f"{r.verdict} instead of {right}"

    says = right + (f", or one line with {', '.join(words)}" if words else "")
    return Case(name, [model, spec, *more], says, reason, judge)


def packed(name: str, model: str) -> Case:
    """A gzipped model, given with and without .gz, for a property that other cases decide."""

    def judge(case: Case, folder: Path, r: Run) -> str:
        return (
            ""
            if r.verdict == "unknown"
            else f"{r.verdict} instead of unknown (as for flt.onnx): {r.said}"
        )

    return Case(name, [model, "tie_v1_unsat.vnnlib"], "as flt.onnx", "VNN-COMP packs models", judge)


def times() -> list[Case]:
    either = ("sat", "unsat", "timeout")
    return [
        in_time(
            "time: slow_one_pixel",
            60,
            "slow_one_pixel_tinyCNN.onnx",
            "slow_one_pixel.vnnlib",
            ("unsat", "sat"),
            8,
        ),
        in_time("time: many_classes_100", 10, *pair("many_classes_100"), either),
        in_time("time: many_classes_1000", 10, *pair("many_classes_1000"), either),
        in_time(
            "time: many_classes_1000_margin30",
            20,
            "many_classes_1000.onnx",
            "many_classes_1000_margin30.vnnlib",
            either,
        ),
        in_time(
            "time: many_classes_1000_margin60",
            20,
            "many_classes_1000.onnx",
            "many_classes_1000_margin60.vnnlib",
            either,
        ),
        in_time("time: timeout_overrun_nas", 30, *pair("timeout_overrun_nas"), either),
    ]


def reader() -> list[Case]:
    # what must not be said of a node whose inputs are quantized
    quantized = ("quantize its inputs",)

    def file(name: str) -> list[str]:
        return ["inspect", f"{name}.onnx"]

    head = "a head after the scores: compare the scores before it"
    fine = {
        "r01_bias_overflow": "the largest sum just fits int32",
        "r07_float_weights_qdq_pair": "weights as floats with a Q-DQ pair fold",
        "r08_shared_quantizer_ties": "",
        "r12_averagepool_include_pad_o17": "",
        "r12_averagepool_include_pad_o19": "",
        "r14_tied_weights": "",
        "r15_convinteger_s8s8": "",
        "r18_matmulinteger_zero_points": "",
        "r19b_opset10_no_zero_point": "",
        "r20_external": "",
        "r24_final_sigmoid": "",
        "r24_final_tanh": "",
        "r25_two_heads": "",
        "r25b_concat_heads_float": "",
        "r25c_concat_box_and_score": "tables that use different ranges of codes can be joined",
        "r27_batch_1": "",
        "r31_constant_qlinearadd": "a constant com.microsoft node is computed by onnxruntime",
        "symbolic_batch_frozen": "",
    }
    wrong = "onnxruntime's fused graph differs from the file without optimisation; both are told"
    batch = "onnxruntime fuses less where the batch is a symbol: freeze it"
    return [
        *(loads(f"reader: {name}", reason, file(name)) for name, reason in fine.items()),
        loads(
            "reader: r02_weight_axis1", wrong, file("r02_weight_axis1"), "optimi|literal|unfused"
        ),
        loads("reader: r30_double_qdq", wrong, file("r30_double_qdq"), "optimi|literal|unfused"),
        refused(
            "reader: qonnx_message",
            "QONNX is no format of onnxruntime",
            file("qonnx_message"),
            "QONNX",
            "Quant",
            "QDQ|QCDQ",
        ),
        refused(
            "reader: r16_fakequantize",
            "a custom domain is told before onnxruntime is asked",
            file("r16_fakequantize"),
            "FakeQuantize",
            "openvino",
            "QDQ|QuantizeLinear",
        ),
        loads_or(
            "reader: r01b_bias_overflow",
            "a sum that leaves int32",
            file("r01b_bias_overflow"),
            "int32",
            "Conv",
        ),
        loads_or(
            "reader: r03_weight_without_zero_point",
            "the weights' DequantizeLinear lacks its zero point, so onnxruntime leaves the "
            "product in float",
            file("r03_weight_without_zero_point"),
            "MatMul_5|MatMul",
            "zero point",
            never=quantized,
        ),
        loads_or(
            "reader: r04_rank2_scale_blocked",
            "blocked scales",
            file("r04_rank2_scale_blocked"),
            "block",
        ),
        loads_or(
            "reader: r05_batched_weights_per_channel",
            "a stack of matrices with one scale per column",
            file("r05_batched_weights_per_channel"),
            "MatMul",
            "batch|stack|per channel|per-channel|3-D|rank",
            never=quantized,
        ),
        loads_or(
            "reader: r06_weight_zero_point_per_row",
            "scales per row of the weights are no op of onnxruntime's",
            file("r06_weight_zero_point_per_row"),
            "QLinearMatMul",
            "scale|zero point",
            never=("ValueError", "broadcast together"),
        ),
        loads_or(
            "reader: r09_relu_zero_point_inside",
            "the Relu keeps onnxruntime from fusing: its output's zero point is not the lowest "
            "code",
            file("r09_relu_zero_point_inside"),
            "Conv",
            "Relu",
            "zero point",
            never=quantized,
        ),
        loads_or(
            "reader: r10_clip_bounds_quantized",
            "the Clip keeps onnxruntime from fusing",
            file("r10_clip_bounds_quantized"),
            "Conv",
            "Clip",
            never=quantized,
        ),
        loads_or(
            "reader: r11_convtranspose",
            "no integer kernel exists",
            file("r11_convtranspose"),
            "ConvTranspose",
        ),
        loads_or(
            "reader: r13_s8_residual",
            "int8 activations with two consumers are not fused; both convolutions are named",
            file("r13_s8_residual"),
            "Conv_4",
            "Conv_11",
            "uint8|QUInt8",
        ),
        loads_or(
            "reader: r18b_matmulinteger_row_zero_points",
            "one per row",
            file("r18b_matmulinteger_row_zero_points"),
            "zero point",
        ),
        loads_or(
            "reader: r19_output_dtype_no_zero_point",
            "without a zero point onnxruntime leaves the product in float",
            file("r19_output_dtype_no_zero_point"),
            "MatMul",
            "zero point",
            never=quantized,
        ),
        refused(
            "reader: r20b_external_missing",
            "a file that is not there",
            file("r20b_external_missing"),
            "r20b.data",
            "missing|no such file|not found|does not exist|not there|lacks",
        ),
        loads_or(
            "reader: r21_s16_activations",
            "16 bits",
            file("r21_s16_activations"),
            "int16",
            "8 bit|8-bit|uint8",
        ),
        loads_or(
            "reader: r21_u16_activations",
            "16 bits",
            file("r21_u16_activations"),
            "uint16",
            "8 bit|8-bit|uint8",
        ),
        loads_or(
            "reader: r22_int4_weights_matmul",
            "onnxruntime leaves a product with 4-bit weights in float",
            file("r22_int4_weights_matmul"),
            "MatMul",
            "int4|4-bit|4 bit",
            never=quantized,
        ),
        loads_or(
            "reader: r22b_int4_weights_conv",
            "onnxruntime leaves a product with 4-bit weights in float",
            file("r22b_int4_weights_conv"),
            "Conv",
            "int4|4-bit|4 bit",
            never=quantized,
        ),
        *(
            loads_or(
                f"reader: r24_final_{name}",
                head,
                file(f"r24_final_{name}"),
                word,
                "scores|before it",
            )
            for name, word in (
                ("argmax", "ArgMax"),
                ("logsoftmax", "LogSoftmax"),
                ("softmax", "Softmax"),
                ("topk", "TopK"),
            )
        ),
        loads_or(
            "reader: r34_float_head_softmax",
            head,
            file("r34_float_head_softmax"),
            "Softmax",
            "scores|before it",
        ),
        loads_or("reader: r26_resize_linear", "no rule", file("r26_resize_linear"), "Resize"),
        loads_or("reader: r26_resize_nearest", "no rule", file("r26_resize_nearest"), "Resize"),
        loads_or("reader: r27_batch_batch", batch, file("r27_batch_batch"), "batch", "--shape"),
        loads(
            "reader: r27_batch_batch --shape",
            batch,
            [*file("r27_batch_batch"), "--shape", "x=1,1,8,8"],
        ),
        loads_or(
            "reader: symbolic_batch_as_published",
            batch,
            file("symbolic_batch_as_published"),
            "batch",
            "--shape",
        ),
        loads(
            "reader: symbolic_batch_as_published --shape",
            batch,
            [*file("symbolic_batch_as_published"), "--shape", "input=1,1,64,64"],
        ),
        loads_or(
            "reader: r32_sum_of_three",
            "a float sum of three codes",
            file("r32_sum_of_three"),
            "Add",
        ),
        loads_or("reader: r33_layernorm", "no rule", file("r33_layernorm"), "LayerNormalization"),
        loads_or(
            "reader: r35_flatten_without_qdq",
            "the Flatten without a Q-DQ pair behind it keeps onnxruntime from fusing the Gemm",
            file("r35_flatten_without_qdq"),
            "Gemm",
            "Flatten",
            never=quantized,
        ),
    ]


CASES = [*sound(), *spec(), *times(), *reader()]

# -- the table -------------------------------------------------------------------------------------


def decide(case: Case, root: Path, scratch: Path) -> tuple[str, str, Run | None]:
    """("ok", "WRONG" or "missing", what came, the run)."""
    source = root / case.folder
    names = [
        name
        for name in case.arguments
        if re.search(r"\.(onnx|vnnlib|gz|npz|zip)$", name) and name != "own.zip"
    ]
    lacking = [
        name
        for name in names
        if not (source / name).exists() and not (source / f"{name}.gz").exists()
    ]
    if lacking:
        return "missing", f"no {lacking[0]}", None
    folder = source
    if case.before is not None:
        folder = scratch / case.folder.replace("/", "_")
        shutil.copytree(source, folder)
        folder.chmod(0o755)
        case.before(folder)
    result = run(case.arguments, folder, case.without_runtime)
    fault = case.judge(case, folder, result)
    return ("WRONG", fault, result) if fault else ("ok", result.verdict, result)


def disagreement(case: Case, root: Path, scratch: Path) -> str:
    """What brute force says other than this script; "" where it agrees or cannot tell."""
    if case.files is None:
        return ""
    model, spec = (root / case.folder / name for name in case.files)
    scratch.mkdir(exist_ok=True)
    found = oracle.truth(model, oracle.read_spec(spec), scratch, most=300_000)
    if found is None:
        return "  oracle: too many points"
    right = case.right.split(",")[0]
    return (
        ""
        if found.verdict == right
        else f"  oracle: {found.verdict} at {found.points} points, not {right}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--oracle", action="store_true", help="ask onnxruntime too")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only in case.name]
    counts = {"ok": 0, "WRONG": 0, "missing": 0}
    print(f"{'':7} {'CPU':>6} {'clock':>6}  case: right | came")
    for case in chosen:
        with tempfile.TemporaryDirectory() as name:
            word, came, r = decide(case, options.folder, Path(name))
            note = (
                disagreement(case, options.folder, Path(name))
                if options.oracle and word != "missing"
                else ""
            )
        counts[word] += 1
        spent = f"{r.cpu:6.1f} {r.wall:6.1f}" if r else f"{'':13}"
        print(f"{word:7} {spent}  {case.name}: {case.right} | {came}{note}", flush=True)
        if word == "WRONG":
            print(
                f"{'':24}because {case.reason}"
                + (f"; it said: {r.said[:300]}" if r and r.said else ""),
                flush=True,
            )
    print(f"{counts['ok']} ok, {counts['WRONG']} wrong, {counts['missing']} missing")
    return 0 if counts["ok"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
