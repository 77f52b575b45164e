"""Write the same report with cbedge and its peers, in turn, on this machine, and compare their speed.

All use the same merged weights, prompt, radiograph and number of tokens, and decode greedily. Every runner has its own
process and waits while another one works. Each round goes through all runners, so that a slow minute of the machine
affects them all, and ratios are taken within a round. With ``--data`` each round is another study, and its report has
as many tokens as the model writes in fp32. llama.cpp takes part if llama-cpp-python is installed, Optimum if
``--optimum-python`` names an interpreter that has optimum-onnx.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from benchmarks.common import EXAMPLE, refuse_existing, write_record
from benchmarks.peer_models import prepare
from benchmarks.peer_report import plot, summarize, to_markdown
from benchmarks.peer_runners import RUNNERS, USUAL, Job, Run, Study, Task, read_image
from cbedge import open_bundle
from cbedge.bundles.bundle import TOKENIZER
from cbedge.prompt import ClinicalContext, build_prompt
from cbedge.provenance import provenance
from training.command_line import run
from training.datasets import open_studies

INDICATION = "cough"
PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "llama-cpp-python",
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _serve(name: str, job: Job, first: Task, connection: Connection) -> None:
    """Load a runner in this process, then run each task that is sent."""
    warnings.simplefilter("ignore")
    try:
        write = RUNNERS[name](job)
        write(first)  # warm-up
        connection.send("ready")
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    while (task := connection.recv()) is not None:
        connection.send(write(task))


def measure(job: Job, names: list[str], tasks: list[Task]) -> dict[str, Any]:
    """Run each task with every runner in turn; returns the runs, and why a runner did not load."""
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    failed: dict[str, str] = {}
    for name in names:
        ours, theirs = context.Pipe()
        tell(f"loading {name}")
        process = context.Process(target=_serve, args=(name, job, tasks[0], theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is noticed
        try:
            answer = ours.recv()
        except EOFError:
            process.join()
            answer = f"its process ended with {process.exitcode}"
        if answer == "ready":
            lines[name] = ours
        else:
            failed[name] = answer.splitlines()[0]
    runs: dict[str, list[Run]] = {name: [] for name in lines}
    for number, task in enumerate(tasks):
        for name, line in lines.items():
            line.send(task)
            done = line.recv()
            runs[name].append(done)
            times = f"{done.whole:.3f} s, language model {done.language:.3f} s"
            tell(f"round {number + 1} of {len(tasks)}: {name}: {times}")
    for line in lines.values():
        line.send(None)
    return {"runs": {name: [asdict(run) for run in found] for name, found in runs.items()}, "failed": failed}


def natural_lengths(bundle: Path, studies: list[Study], threads: int) -> list[int]:
    """Numbers of tokens of the reports that the bundle's ``fp32`` writes, stop tokens included."""
    from cbedge.api import ReportGenerator
    from cbedge.decoding import decode

    generator = ReportGenerator.from_pretrained(bundle, "fp32", "cpu", threads)
    manifest, backend = generator.bundle.manifest, generator.backend
    most, lengths = manifest.decoding["max_new_tokens"], []
    for image, context in studies:
        reading, ids = read_image(generator, image, context)
        embeds = np.concatenate([reading.image_embeds, backend.embed_tokens(ids)], axis=1)
        decoder = backend.new_decoder(embeds.shape[1] + most)
        lengths.append(sum(1 for _ in decode(decoder, decoder.prefill(embeds), manifest.stop_ids, most)))
    return lengths


def plan(bundle: Path, studies: list[Study], tokens: int | None, threads: int) -> list[Task]:
    """The reports to write: with ``tokens`` tokens, or with as many as the bundle's ``fp32`` writes."""
    opened = open_bundle(bundle)
    tokenizer, manifest = Tokenizer.from_file(str(opened.folder / TOKENIZER)), opened.manifest
    if tokens:
        lengths = [tokens] * len(studies)
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as aside:  # frees its memory when it ends
            lengths = aside.submit(natural_lengths, bundle, studies, threads).result()
    image_ids = (*[5] * manifest.shapes.num_query_tokens, *manifest.prefix_ids)
    tasks = []
    for (image, context), length in zip(studies, lengths, strict=True):
        prompt = tokenizer.encode(build_prompt(context, ()), add_special_tokens=False)
        tasks.append(Task(image, context, length, (*image_ids, *prompt.ids, *manifest.suffix_ids)))
    return tasks


def _chosen(device: str, only: list[str] | None, optimum_python: str | None) -> list[str]:
    """The runners to compare.

    Raises:
        ValueError: a name is unknown.
    """
    if device not in USUAL:
        raise ValueError(f"unknown device {device!r}; give one of: {', '.join(USUAL)}")
    unknown = [name for name in only or () if name not in RUNNERS]
    if unknown:
        raise ValueError(f"unknown runner {unknown[0]!r}; give one of: {', '.join(RUNNERS)}")
    return only or [n for n in USUAL[device] if optimum_python or not n.startswith("Optimum")]


@app.command(help=__doc__)
def main(
    bundle: Annotated[Path, typer.Option(help="A bundle with int4, int8 and fp32.")],
    output: Annotated[Path, typer.Option(help="Record as OUTPUT.json, .md and .png.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Its checkpoint, as for python -m export.", show_default="the bundle's fp32, restored"),
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of its run.")] = None,
    image: Annotated[Path, typer.Option(help="Radiograph to draft.", show_default="examples/chest_pa.png")] = EXAMPLE,
    indication: Annotated[str, typer.Option(help="Indication in the prompt.")] = INDICATION,
    data: Annotated[
        Path | None, typer.Option(help="Use the first validation studies of this data set instead, one per round.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens to write.", show_default="60; with --data as many as fp32 does")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds through all runners.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    optimum_python: Annotated[str | None, typer.Option(help="Interpreter that has optimum-onnx.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these runners; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing record.")] = False,
) -> None:
    """Measure, print and record."""
    refuse_existing(output.with_suffix(".json"), force)
    names = _chosen(device, only, optimum_python)
    studies = rounds * [(image.absolute(), ClinicalContext(indication, view="frontal"))]
    if data is None:
        tokens = tokens or 60
    else:
        studies = [(s.image.absolute(), s.context) for s in open_studies(data, ("val",), rounds)]
        if not studies:
            raise ValueError(f"{data} has no validation study")
    open_bundle(bundle).variant(None if tokens else "fp32")
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(checkpoint, adapters, bundle, Path(scratch), names, tell)
        job = Job(model.absolute(), bundle.absolute(), threads, device, optimum_python)
        tasks = plan(job.bundle, studies, tokens, threads)
        found = measure(job, names, tasks)
    drafted = f"{rounds} validation studies of IU X-RAY" if data else image.name
    record = provenance(drafted, bundle, PACKAGES) | {
        "tokens": [pick(task.tokens for task in tasks) for pick in (min, statistics.median, max)],
        "rounds": len(tasks),
        "threads": threads,
        "summary": summarize(found["runs"]),
        "failed": found["failed"],
    }
    write_record(record, output, to_markdown(record))
    plot(record, output.with_suffix(".png"))


def tell(text: str) -> None:
    """Report progress on standard error."""
    typer.echo(text, err=True)


if __name__ == "__main__":
    run(app)
