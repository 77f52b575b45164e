"""``python -m benchmarks``: how long a draft takes on this machine, by stage, and how much memory it needs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cbedge.errors import CbedgeError

EXAMPLE = Path(__file__).parent.parent / "examples" / "chest_pa.png"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def latency(
    images: Annotated[
        list[Path] | None, typer.Argument(help="Radiographs, or folders of them [default: the example].")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Drafts to time; images are taken in turn.")] = 20,
    model: Annotated[Path | None, typer.Option(help="Folder of a bundle [default: embedded].")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, in the warm process.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: one a core].")] = None,
    indication: Annotated[str, typer.Option(help="Given with every radiograph.")] = "cough",
    tokens: Annotated[int | None, typer.Option(min=1, help="End every draft after so many tokens.")] = None,
    cold: Annotated[int, typer.Option(min=0, help="Runs of the command line in a new process.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Record as OUTPUT.json and OUTPUT.md.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a record that is already there.")] = False,
) -> None:
    """Measure, print and record."""
    from benchmarks.latency import check_images, machine, measure_cold, measure_warm, to_markdown

    for suffix in (".json", ".md"):
        if output and output.with_suffix(suffix).exists() and not force:
            raise ValueError(f"{output.with_suffix(suffix)} exists already: give --force to replace it")
    found = [f for path in images or [EXAMPLE] for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
    if not found:
        raise ValueError("there is no file in the given folders")
    chosen = [found[i % len(found)] for i in range(limit)]
    check_images(chosen)
    record = {
        "machine": machine(),
        "command": "python -m benchmarks " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
        "warm": measure_warm(model, chosen, indication, device, threads, tokens),
        "cold": measure_cold(model, chosen[0], indication, cold) if cold else None,
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
    typer.echo(to_markdown(record))


def main() -> None:
    """Run the command line; an expected failure is one line and a non-zero exit code."""
    try:
        app()
    except (CbedgeError, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
