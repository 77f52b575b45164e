"""The model builder's command line: ``python -m training fetch-base | run | evaluate``."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from training.fetch import DEFAULT_CACHE

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("fetch-base")
def fetch_base_command(
    cache: Annotated[Path, typer.Option(help="Where base weights are kept.")] = DEFAULT_CACHE,
) -> None:
    """Download the mini configuration's base weights: pinned, hash-checked, kept."""
    from training.fetch import BASE_PARTS, fetch_base

    for part in BASE_PARTS:
        typer.echo(f"{part.name}: {fetch_base(part, cache)}")


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Option(help="The run's YAML, such as training/configs/iu_xray_mini.yaml.")],
    data: Annotated[Optional[Path], typer.Option(help="Folder of the data, over the file's.")] = None,
    output: Annotated[Optional[Path], typer.Option(help="Folder of the run, over the file's.")] = None,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[Optional[str], typer.Option(help="auto (fp32 on CPU, bf16 on GPU), fp32 or bf16.")] = None,
    cache: Annotated[Path, typer.Option(help="Where base weights are kept.")] = DEFAULT_CACHE,
    max_steps: Annotated[Optional[int], typer.Option(min=1, help="End each stage early, for a trial.")] = None,
) -> None:
    """Train the stages of a configuration; run it again to go on after an interruption."""
    from training.config import load_config
    from training.train import run

    folder = run(load_config(config, data=data, output=output, device=device, precision=precision), cache, max_steps)
    typer.echo(f"trained: {folder}")


def main() -> None:
    """Run the command line; an expected failure is one line and exit code 1."""
    try:
        app()
    except (FileNotFoundError, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
