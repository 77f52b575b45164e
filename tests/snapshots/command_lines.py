"""``python -m tests.snapshots.command_lines``: JSON of every command line's help and options.

The caller fixes width, colours and home folder by environment variables, some of which are read at import.
"""

import importlib
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("training", "export", "benchmarks")


def programs() -> Iterator[tuple[str, typer.Typer]]:
    """What a user types to start each command line, and its application."""
    yield "cbedge", importlib.import_module("cbedge.cli.main").app
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "\napp = typer.Typer(" in path.read_text(encoding="utf-8"):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                yield f"python -m {module.removesuffix('.__main__')}", importlib.import_module(module).app


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command under what is typed for it, and all below it."""
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {word}", inner)


def help_text(program: str, command: Any, name: str) -> str:
    """What ``--help`` prints, without spaces at the ends of lines."""
    words = name.removeprefix(program).split()
    out = io.StringIO()
    with redirect_stdout(out):
        command.main([*words, "--help"], prog_name=program, standalone_mode=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def option(parameter: Any) -> str:
    """A parameter in one line: spellings, type, whether it is required or repeatable, its variable and default."""
    spellings = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        spellings = parameter.name.upper()
    kind = "flag" if getattr(parameter, "is_flag", False) else parameter.type.name
    default = parameter.default
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        default = default.relative_to(ROOT)
    notes = {
        "required": parameter.required,
        "repeatable": getattr(parameter, "multiple", False) or parameter.nargs == -1,
        f"variable {parameter.envvar}": parameter.envvar,
        f"default {default}": default is not None and default is not False,
    }
    return ", ".join([f"{spellings}: {kind}", *(note for note, given in notes.items() if given)])


def main() -> None:
    """Print it."""
    found: dict[str, dict[str, Any]] = {}
    for program, app in programs():
        root = typer.main.get_command(app)
        found[program] = {
            name: {
                "help": help_text(program, root, name),
                "options": [option(parameter) for parameter in command.params],
            }
            for name, command in commands(program, root)
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
