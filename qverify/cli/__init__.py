"""The command `qverify`.

    qverify MODEL SPEC [RESULTS_FILE] [OPTIONS]  decide one property
    qverify batch INSTANCES.csv [OPTIONS]        run a VNN-COMP instances file
    qverify robustness MODEL DATA [OPTIONS]      measure a classifier's certified accuracy
    qverify inspect MODEL                        show the integer network read from an ONNX file
    qverify check MODEL SPEC CERTIFICATE         accept (exit code 0) or reject (1) a certificate
    qverify train DATA --out DIR [OPTIONS]       train a certifiably robust quantized classifier

Standard output: the first line is sat, unsat, unknown or timeout, and a counterexample follows sat.
Everything else goes to standard error. Exit codes:

    0  unsat: the property holds            3  unknown or timeout
    1  sat: violated, counterexample shown  4  internal error, please report it
    2  bad usage, bad or unsupported input  130  interrupted

Nothing heavy is imported here: the commands load what they need.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qverify import __version__
from qverify.cli.options import checked_option, common_options, jobs_option, shape_option
from qverify.cli.robustness import robustness
from qverify.cli.train import train
from qverify.errors import QverifyError, SoundnessError, UnsupportedModel, UsageError
from qverify.files import check_writable, remove_old, write_bytes, write_text
from qverify.formats import as_json, read_counterexample, verdict_text
from qverify.options import Options
from qverify.printer import Printer

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qverify.result import Result

_EXIT_CODES = {"unsat": 0, "sat": 1, "unknown": 3, "timeout": 3}
_EPILOG = (
    "\b\nExit codes:\n"
    "  0    unsat: no input in the box is unsafe, the property holds\n"
    "  1    sat: violated, the counterexample is printed\n"
    "  2    bad usage, or a file that is missing, broken or unsupported\n"
    "  3    unknown or timeout\n"
    "  4    internal error: please report it\n"
    "  130  interrupted"
)


class _DefaultVerify(click.Group):
    """A group whose command `verify` may be left out: `qverify M S` is `qverify verify M S`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and not args:  # a shell asks for completions
            return super().parse_args(ctx, args)
        if not args:
            raise click.UsageError("MODEL and SPEC are missing", ctx)
        if args[0] not in {*self.commands, "-h", "--help", "--version"}:
            meant = (
                []
                if os.path.exists(args[0])
                else difflib.get_close_matches(args[0], self.commands, 1)
            )
            if meant and not ctx.resilient_parsing:
                raise click.UsageError(
                    f"there is no command and no file '{args[0]}': is '{meant[0]}' meant?", ctx
                )
            args = ["verify", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The first word is a command or a model."""
        from click.shell_completion import CompletionItem

        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("qverify", "MODEL SPEC [RESULTS_FILE] [OPTIONS]")
        formatter.write_usage("qverify", "batch INSTANCES.csv [OPTIONS]", prefix="       ")
        formatter.write_usage(
            "qverify", "robustness MODEL DATA --eps E [OPTIONS]", prefix="       "
        )
        formatter.write_usage("qverify", "inspect MODEL", prefix="       ")
        formatter.write_usage("qverify", "check MODEL SPEC CERTIFICATE", prefix="       ")
        formatter.write_usage("qverify", "train DATA --out DIR", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options of `verify` as well: they are what a first look at --help is for."""
        params = (*self.commands["verify"].params, *self.get_params(ctx))
        records = [
            param.get_help_record(ctx) for param in params if isinstance(param, click.Option)
        ]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])
        self.format_commands(ctx, formatter)


@click.group(
    cls=_DefaultVerify,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EPILOG,
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Decide whether a quantized ONNX network satisfies a VNN-LIB property.

    MODEL is an ONNX file, SPEC a VNN-LIB file (1.0 or 2.x), both also as .gz. The verdict is the
    first line of standard output: unsat (the property holds), sat (a counterexample follows),
    unknown or timeout. RESULTS_FILE receives the same text.
    """


@cli.command("verify", short_help="Decide one property; the word may be left out.", epilog=_EPILOG)
@click.argument("model", type=click.Path())
@click.argument("spec", type=click.Path())
@click.argument("results_file", required=False, type=click.Path())
@common_options("Stop after S seconds.")
@checked_option("--batch", metavar="N", type=int, help="Boxes bounded at once [default: chosen].")
@click.option(
    "--branch",
    metavar="RULE",
    default=Options().branch,
    show_default=True,
    help="Rule that picks where to split: influence, balanced or widest split inputs, gap and "
    "filtered cut neurons; auto chooses.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(),
    help="Write verdict, counterexample and statistics as JSON.",
)
@click.option(
    "--certificate",
    "proof_file",
    metavar="FILE",
    type=click.Path(),
    help="Write what the verdict rests on, for qverify check.",
)
@click.option(
    "--watch-point",
    "watch_file",
    metavar="FILE",
    type=click.Path(),
    help=(
        "For debugging: a counterexample as printed after `sat`; an error says if the search ever "
        "discards it."
    ),
)
@click.option(
    "--exit-zero", is_flag=True, help="Exit with 0 for every verdict (for competition scripts)."
)
@click.pass_obj
def _verify(
    printer: Printer,
    /,
    model: str,
    spec: str,
    results_file: str | None,
    json_file: str | None,
    proof_file: str | None,
    watch_file: str | None,
    exit_zero: bool,
    verbose: bool,
    no_attack: bool,
    **chosen: Any,
) -> int:
    """Decide the property SPEC of the network MODEL; RESULTS_FILE receives what standard output
    does."""
    printer.verbose = verbose
    _check_order(MODEL=model, SPEC=spec)
    wanted = [path for path in (results_file, json_file, proof_file) if path is not None]
    for path in wanted:
        check_writable(path, model, spec, *filter(None, [watch_file]))
    if len({os.path.realpath(path) for path in wanted}) < len(wanted):
        raise UsageError("RESULTS_FILE, --json and --certificate must name different files")
    watch = None if watch_file is None else _watched(watch_file, spec)
    for path in wanted:
        # Whatever happens from here on, no answer to an earlier question stays behind. An old proof
        # stays until there is a new one: it is checked before it is believed.
        if path != proof_file:
            remove_old(path)
    options = Options(
        attack=not no_attack, certificate=proof_file is not None, watch=watch, **chosen
    )
    result = _decide(model, spec, options, printer)

    # Before the files: a full disk must not swallow the verdict.
    printer.answer(verdict_text(result))
    if results_file is not None:
        write_text(results_file, verdict_text(result))
    if json_file is not None:
        write_text(json_file, as_json(result, model, spec, options))
    if proof_file is not None and result.certificate is not None:
        write_bytes(proof_file, result.certificate)
    elif proof_file is not None:
        kept = "; what that file holds is from before" if os.path.exists(proof_file) else ""
        printer.line(
            f"no certificate is written to {proof_file}: {result.verdict.value} has none here{kept}"
        )
    _explain(result, printer)
    return 0 if exit_zero else _EXIT_CODES[result.verdict.value]


_ENDINGS = {"MODEL": (".onnx", ".onnx.gz"), "SPEC": (".vnnlib", ".vnnlib.gz")}


def _check_order(**files: str) -> None:
    """Raise UsageError where the names of the files, given by argument, tell that they are
    swapped."""
    for argument, endings in _ENDINGS.items():
        if files[argument].lower().endswith(endings):
            continue
        for place, path in files.items():
            if path.lower().endswith(endings):
                raise UsageError(
                    f"the files are swapped ({path} as {place}): the order is {' '.join(files)}"
                )


def _watched(path: str, spec: str) -> tuple[float, ...]:
    """The inputs in a counterexample file for the property `spec`."""
    from qverify.vnnlib.reader import read_property

    return read_counterexample(path, read_property(Path(spec)))


def _decide(model: str, spec: str, options: Options, printer: Printer) -> Result:
    """Run the verifier; what the imports took is taken off the time limit."""
    from qverify.verification import verify

    limit = options.timeout
    if limit is not None:
        limit = max(limit - printer.elapsed(), 0.001)
    try:
        return verify(model, spec, dataclasses.replace(options, timeout=limit), printer.search)
    finally:
        printer.clear()


def _explain(result: Result, printer: Printer) -> None:
    """Print the warnings, with -v the counters, and a last line that says why this verdict."""
    for warning in result.details.get("warnings", ()):
        printer.line(f"warning: {warning}")
    if printer.verbose:
        facts = {
            key: value
            for key, value in result.details.items()
            if isinstance(value, str | int | float)
        }
        for name, value in (facts | dataclasses.asdict(result.stats)).items():
            printer.block(
                f"  {name:16} {value:.3f}\n"
                if isinstance(value, float)
                else f"  {name:16} {value}\n"
            )
    reason = f": {result.reason}" if result.reason else ""
    printer.line(f"{result.verdict.value} in {printer.elapsed():.2f} s{reason}")


@cli.command("batch", short_help="Run a VNN-COMP instances file.")
@click.argument("instances", type=click.Path())
@click.option(
    "--results",
    metavar="CSV",
    type=click.Path(),
    default="results.csv",
    show_default=True,
    help=(
        "Rows category,onnx,vnnlib,prepare_time,result,run_time are appended here; rows already "
        "there are kept."
    ),
)
@jobs_option
@click.option(
    "--filter", "text", metavar="TEXT", default="", help="Only instances whose paths contain TEXT."
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Only the first N instances."
)
@common_options("Stop every instance after S seconds, whatever its row says.")
@click.pass_obj
def _batch(
    printer: Printer,
    /,
    instances: str,
    results: str,
    jobs: int,
    text: str,
    limit: int | None,
    timeout: float | None,
    verbose: bool,
    no_attack: bool,
    **chosen: Any,
) -> int:
    """Run the rows `onnx,vnnlib,timeout` of INSTANCES, whose paths are relative to the file's
    folder.

    --timeout replaces the limit in every row. An instance that overruns its limit is killed and
    recorded as timeout. Counterexamples go to a folder next to the results. Run the same command
    again to go on after an interruption. Exits with 0 when every instance has a row, whatever its
    verdict.
    """
    from qverify import batch

    printer.verbose = verbose
    options = Options(attack=not no_attack, **chosen)
    selected = [
        entry
        for entry in batch.read_instances(instances, timeout)
        if text in f"{entry.onnx},{entry.vnnlib}"
    ]
    if not selected:
        what = f"no row's paths contain '{text}' (--filter)" if text else "it holds no instance"
        raise UsageError(f"{instances}: {what}")
    batch.run(selected[:limit], results, options, jobs, printer)
    return 0


@cli.command("inspect", short_help="Show the integer network read from an ONNX file.")
@click.argument("model", type=click.Path())
@shape_option
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_obj
def _inspect(printer: Printer, /, model: str, shapes: tuple[str, ...], verbose: bool) -> int:
    """Show the integer network that qverify reads from the ONNX file MODEL, or all that stops it, a
    line each."""
    from qverify.inspect import describe

    printer.verbose = verbose
    try:
        text = describe(model, shapes)
    except UnsupportedModel as error:
        if not error.blockers:
            raise
        printer.block("".join(f"{line}\n" for line in error.blockers))
        raise UnsupportedModel(f"{model}: it cannot be read, for the reasons above") from None
    printer.answer(text.rstrip("\n") + "\n")
    return 0


@cli.command("check", short_help="Check a certificate.")
@click.argument("model", type=click.Path())
@click.argument("spec", type=click.Path())
@click.argument("certificate", type=click.Path())
@shape_option
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_obj
def _check(
    printer: Printer,
    /,
    model: str,
    spec: str,
    certificate: str,
    shapes: tuple[str, ...],
    verbose: bool,
) -> int:
    """Check that CERTIFICATE proves its verdict for the network MODEL and the property SPEC,
    independently of the solver.

    Prints `accepted` with the verdict that is proved (`unsat`, or `sat`: the property is violated)
    and exits with 0; or prints `rejected` with the reason and exits with 1; with 2 where a file
    cannot be read.
    """
    from qverify.checker import Rejected, check

    printer.verbose = verbose
    _check_order(MODEL=model, SPEC=spec, CERTIFICATE=certificate)
    try:
        report = check(Path(model), Path(spec), Path(certificate), shapes)
    except Rejected as reason:
        printer.answer(f"rejected: {reason}\n")
        return 1
    printer.answer(f"accepted {report.verdict}\n")
    what = (
        f"{report.leaves} leaves, {report.intermediate} intermediate bounds"
        if report.verdict == "unsat"
        else "the counterexample"
    )
    printer.line(f"checked {what} in {report.seconds:.2f} s")
    return 0


cli.add_command(robustness)
cli.add_command(train)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error becomes one line on standard
    error."""
    printer = Printer()
    try:
        code: int | None = cli.main(argv, prog_name="qverify", standalone_mode=False, obj=printer)
        return code or 0
    except (click.Abort, KeyboardInterrupt):
        printer.line("interrupted")
        return 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path.removesuffix(" verify") if context else "qverify"
        printer.line(f"error: {error.format_message()} ({command} --help shows the usage)")
        return 2
    except SoundnessError as error:
        return _our_fault(error, printer)
    except QverifyError as error:
        printer.line(f"error: {error}")
        return 2
    except MemoryError:
        printer.line("error: not enough memory for this model or data")
        return 2
    except OSError as error:  # a file that went away or may not be read
        place = f"{error.filename}: " if error.filename else ""
        printer.line(f"error: {place}{error.strerror or error}")
        return 2
    except Exception as error:  # the door: nothing else in qverify catches everything
        return _our_fault(error, printer)


def _our_fault(error: Exception, printer: Printer) -> int:
    """Ask for a report; the traceback is for -v."""
    if printer.verbose:
        import traceback

        printer.block("".join(traceback.format_exception(error)))
    name = type(error).__name__
    please = (
        ""
        if "please report" in str(error)
        else "; please report it with the model and the specification"
    )
    printer.line(f"internal error: {name}: {error}{please}")
    return 4


if __name__ == "__main__":
    sys.exit(main())
