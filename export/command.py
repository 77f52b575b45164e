"""What the commands of this folder have in common: how they end."""

import sys

import typer
import yaml

from cbedge.errors import CbedgeError


def run(app: typer.Typer) -> None:
    """Run a command line; an expected failure is one line and a non-zero exit code."""
    try:
        app()
    except (CbedgeError, ValueError, RuntimeError, OSError, yaml.YAMLError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
