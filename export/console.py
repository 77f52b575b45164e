"""What the commands of this folder share: the index of programs, step lines, quiet libraries, errors in one line."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console


def programs(folder: Path) -> dict[str, str]:
    """The modules of a folder that have a command line, each with its first paragraph of documentation."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\napp = typer.Typer(" in text and path.stem != "__main__":
            about = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
            found[path.stem] = about
    return found


class Steps:
    """Prints one line for each finished step to standard error: its name, what was done, seconds, and size."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._last = perf_counter()

    def done(self, step: str, what: str, files: Iterable[Path] = ()) -> None:
        """Report a step that took the time since the last one, and the size of the files that it wrote."""
        now = perf_counter()
        size = sum(file.stat().st_size for file in files) / 1e6
        line = f"{step:<10} {what:<56} {now - self._last:7.1f} s" + (f" {size:9.1f} MB" if size else "")
        self.note(line)
        self._last = now

    def note(self, text: str) -> None:
        """Print something that took no time of its own."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _set_logs(verbose: bool) -> bool:
    if not verbose:
        quiet_libraries()
    return verbose


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", callback=_set_logs, help="Show progress bars and all log messages of the export libraries."
    ),
]


def quiet_libraries() -> None:
    """Hide progress bars, messages that report no problem, and deprecations between the libraries; keep warnings."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The quantizer warns of each node that it skips; the tracer, that torchvision is not installed, which nothing uses.
    for name in ("onnxruntime.quantization", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    # Blocks that hold zeros alone are divided by zero, and the result is not used.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"onnxruntime\.quantization")
