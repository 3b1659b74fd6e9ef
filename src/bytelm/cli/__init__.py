"""The command line: `bytelm COMMAND`. Every command is a typed function; torch is imported only when one needs it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter
from cyclopts.config import Env

from bytelm import __version__
from bytelm.cli import (
    advising,
    benching,
    comparing,
    compressing,
    costs,
    data,
    doctor,
    evaluating,
    exchanging,
    generating,
    inspect,
    online,
    robustness,
    serving,
    sweeping,
    training,
)
from bytelm.cli.common import STDIN, refuse_stdin
from bytelm.errors import BytelmError
from bytelm.machine import wait_without_spinning
from bytelm.training.stop import Interrupted, exit_code

app = App(
    name="bytelm",
    help="Language models over raw bytes: train on any files, measure in bits per byte, generate exactly.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` reports the interruption in one line
    help_format="plaintext",
    default_parameter=Parameter(validator=refuse_stdin),
    config=Env("BYTELM_", command=False, show=False),  # BYTELM_QUIET=1 is --quiet, of any command that has it
    help_epilogue=(
        "Start with `bytelm doctor` and `bytelm demo`, or `bytelm train PATH`. Environment variables: BYTELM_QUIET=1 "
        "is --quiet, and so for every option; NO_COLOR=1 disables colours; BYTELM_DEBUG=1 shows tracebacks."
    ),
)
app.command(doctor.doctor)
app.command(training.train)
app.command(data.app)
app.command(evaluating.evaluate, name="eval")
app.command(generating.generate)
app.command(serving.serve)
app.command(inspect.patches)
app.command(compressing.compress)
app.command(compressing.decompress)
app.command(online.prime)
app.command(training.calibrate)
app.command(inspect.presets)
app.command(costs.costs)
app.command(comparing.compare)
app.command(sweeping.sweep)
app.command(advising.advise)
app.command(robustness.robust)
app.command(benching.app)
app.command(inspect.report)
app.command(exchanging.convert)
app.command(exchanging.export)
app.command(training.demo)
app.register_install_completion_command()


def main(tokens: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code: 0, the exit code of the error, or that of a signal (`training.stop`)."""
    steady_output()
    wait_without_spinning()
    sys.exit(run(sys.argv[1:] if tokens is None else tokens))


def steady_output() -> None:
    """Discard output to streams that were closed before the start, and escape characters they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for as long as we run
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(tokens: Sequence[str]) -> int:
    """`main` without the exit. A user's error is one line on standard error, without a traceback."""
    tokens = [STDIN if token == "-" else token for token in tokens]  # cyclopts takes a lone hyphen for an option
    try:
        code = app(tokens, exit_on_error=False, print_error=False)
    except MissingArgumentError as error:
        return fail(f"usage: {lacking(error)}", 2)
    except CycloptsError as error:
        return fail(f"usage: {' '.join(str(error).replace(STDIN, '-').split())}", 2)
    except BytelmError as error:
        if os.environ.get("BYTELM_DEBUG"):
            raise
        return fail(f"{error.code}: {error}", error.exit_code)
    except Interrupted as stopped:
        return fail(str(stopped), exit_code(stopped.signal))
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output closed it
        return 0
    return code if isinstance(code, int) else 0


def lacking(error: MissingArgumentError) -> str:
    """What a command was not given, and where it says what that is."""
    assert error.argument is not None
    field, command = error.argument.field_info, " ".join(("bytelm", *(error.command_chain or ())))
    name = field.name.upper() if field.is_positional else error.argument.name
    what = f"{error.keyword} has no value" if error.keyword else f"{name} is missing"
    return f"{what}: see `{command} --help`"


def fail(message: str, code: int) -> int:
    """Print an error in one line."""
    print(f"bytelm: {message}", file=sys.stderr)
    return code
