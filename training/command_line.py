"""Run a command line of training, export or benchmarks."""

import sys

import typer
import yaml

from cbedge.errors import CbedgeError


def run(app: typer.Typer) -> None:
    """Run a command line; an expected failure is one line and exit code 1."""
    try:
        app()
    except (CbedgeError, ValueError, RuntimeError, OSError, yaml.YAMLError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
