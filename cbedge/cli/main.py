"""The command line: one file a command."""

import signal
import sys
import threading
from typing import Annotated, NoReturn

import typer

from cbedge import __version__
from cbedge.cli.batch import batch
from cbedge.cli.bench import bench
from cbedge.cli.doctor import doctor
from cbedge.cli.generate import generate
from cbedge.cli.listen import listen
from cbedge.cli.model import model
from cbedge.cli.schema import schema
from cbedge.cli.serve import serve
from cbedge.cli.terminal import discard_output, prepare_streams, print_error
from cbedge.errors import CbedgeError, OutputError, memory_errors

app = typer.Typer(
    help="Draft chest radiograph reports on one workstation, offline. Research use; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cbedge {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (generate, batch, serve, listen, doctor, model, schema, bench):
    app.command()(command)


class _Interrupted(BaseException):
    """Ctrl-C. Not a :class:`KeyboardInterrupt`, for which the command-line library prints its own message."""


def main() -> NoReturn:
    """Run the command line. An expected failure prints one line to standard error and sets the exit code."""
    prepare_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        sys.exit(_run())
    except BrokenPipeError:  # the reader closed the pipe, as with `| head`
        discard_output()
        sys.exit(141)


def _run() -> int:
    try:
        with memory_errors():
            try:
                app()
            except SystemExit as end:
                sys.stdout.flush()
                return end.code if isinstance(end.code, int) else int(end.code is not None)
            sys.stdout.flush()
            return 0
    except CbedgeError as error:
        print_error(f"cbedge: {error}")
        return error.exit_code
    except BrokenPipeError:
        raise
    except _Interrupted:
        print_error("cbedge: interrupted")
        return 130
    except OSError as error:
        if error.filename is not None or sys.stdout.closed:
            raise
        discard_output()
        print_error(f"cbedge: cannot write to standard output: {error.strerror}; give --output FILE")
        return OutputError.exit_code


def _interrupt(number: int, frame: object) -> NoReturn:
    raise _Interrupted
