"""Terminal functions that several commands share: messages, status line, output streams, text files."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cbedge.errors import ContextError

if TYPE_CHECKING:
    from cbedge.api import ReportGenerator


def print_error(text: str) -> None:
    """Print to standard error. A failure to print is ignored: it changes neither the work nor the exit code."""
    with suppress(OSError):
        typer.echo(text, err=True)


def discard_output() -> None:
    """Redirect standard output to nowhere, so that Python does not retry a failed write when it exits."""
    sink = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(sink, sys.stdout.fileno())


def prepare_streams() -> None:
    """Make the output streams safe: a closed stream or an unprintable character causes no traceback."""
    if sys.stdout is None:  # closed, as with `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A status line on the terminal; without a terminal on standard error, nothing is shown."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def read_text_file(path: Path) -> str:
    """Read a text file that holds a template.

    Raises:
        ContextError: the file cannot be read.
    """
    try:
        if not path.is_file() and path.exists():
            raise ContextError(f"{path} is not a regular file; pass a text file with a normal report")
        with open(path, encoding="utf-8-sig") as file:
            return file.read(1 << 20)
    except FileNotFoundError:
        raise ContextError(f"no such file: {path}; pass a text file with a normal report") from None
    except UnicodeDecodeError:
        raise ContextError(f"{path} is not valid UTF-8; pass a text file with a normal report") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ContextError(f"cannot read {str(path)[:100]} ({reason}): pass a text file with a normal report") from None


def keep_to_template(generator: ReportGenerator, template: Path | None) -> ReportGenerator:
    """The generator; if a template file is given, all its drafts follow that template."""
    if template is not None:
        generator.keep_to(read_text_file(template))
    return generator
