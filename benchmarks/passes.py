"""Measure each stage of a draft, and a pass of the language model over few and many tokens.

``cbedge bench`` measures whole drafts. This also works with a model of random weights, whose drafts mean nothing. The
record has medians in milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import write_record
from cbedge import ReportGenerator
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
TOKENS = (1, 2, 5, 9, 17, 33)  # a GPU runs passes over 2, 5, 9, 17 or 33


def milliseconds(work: Callable[[], object], runs: int) -> float:
    """Median of the runs, after three untimed ones."""
    times = []
    for number in range(runs + 3):
        start = perf_counter()
        work()
        times += [perf_counter() - start] if number >= 3 else []
    return round(1000 * statistics.median(times), 3)


def measure(generator: ReportGenerator, prompt: int, runs: int) -> dict[str, float]:
    """Milliseconds of each stage; ``prompt`` embeddings precede the tokens of a pass."""
    backend, shapes = generator.backend, generator.bundle.manifest.shapes
    rng = np.random.default_rng(0)
    pixels = rng.random((1, 3, shapes.image_size, shapes.image_size), np.float32)
    instruction = np.full((1, 20), 10, np.int64)
    embeds = (0.02 * rng.standard_normal((1, prompt, shapes.hidden_size))).astype(np.float32)
    features = backend.encode_image(pixels)
    found = {
        "vision": milliseconds(lambda: backend.encode_image(pixels), runs),
        "qformer": milliseconds(lambda: backend.query_image(features, instruction), runs),
        f"prefill of {prompt}": milliseconds(lambda: backend.new_decoder(prompt + 34).prefill(embeds), runs),
    }
    decoder = backend.new_decoder(prompt + 34)
    decoder.prefill(embeds)

    def go(count: int) -> None:
        decoder.append([5] * count)
        decoder.rewind(prompt)

    return found | {f"pass over {count}": milliseconds(partial(go, count), 2 * runs) for count in TOKENS}


@app.command(help=__doc__)
def main_command(
    bundle: Annotated[Path, typer.Option(help="A bundle.")],
    variant: Annotated[
        str | None, typer.Option(help="Variant of the bundle.", show_default="chosen for this machine")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    prompt: Annotated[int, typer.Option(min=1, help="Length of the prompt in embeddings.")] = 80,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each stage; twice as many of a pass.")] = 20,
) -> None:
    """Measure and print as JSON."""
    generator = ReportGenerator.from_pretrained(bundle, variant, device)
    record = provenance("random embeddings", bundle)
    record |= {"variant": generator.variant, "device": generator.backend.device}
    write_record(record | {"ms": measure(generator, prompt, runs)}, None)


if __name__ == "__main__":
    app()
