"""``python -m benchmarks.peers``: the same report through cbedge and its peers, in turn, on this machine.

Same merged weights, prompt, radiograph and number of tokens, greedy. Every runner lives in a process of its own and
waits while another works; rounds go through all of them in turn, so that a slow minute of the machine meets them all,
and ratios are taken round by round. With ``--data`` each round is another study, and its report as long as the model in
fp32 writes it. llama.cpp takes part where ``pip install llama-cpp-python`` was done, Optimum where ``--optimum-python``
names an interpreter that has optimum-onnx.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from cbedge import CbedgeError, open_bundle
from cbedge.backends.provider import is_installed
from cbedge.bench import machine
from cbedge.bundles.bundle import TOKENIZER
from cbedge.decoding import Decoder, Token
from cbedge.prompt import ClinicalContext, build_prompt
from training.datasets import open_studies

if TYPE_CHECKING:
    from cbedge.api import ReportGenerator
    from cbedge.findings.reading import ImageReading

EXAMPLE = Path(__file__).parent.parent / "examples" / "chest_pa.png"
INDICATION = "cough"
CONTEXT = 512  # positions for which llama.cpp makes room, its own default
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Job:
    """What every runner does.

    Attributes:
        checkpoint: the merged model in transformers' format; its language model alone is in ``language``, as ONNX
            Runtime GenAI's in ``genai``, and as llama.cpp's in ``language-*.gguf``.
        bundle: the same as a bundle.
        threads: CPU threads.
        device: ``cpu`` or ``cuda``.
        optimum_python: an interpreter with optimum-onnx, for the language model in ``optimum``.
    """

    checkpoint: Path
    bundle: Path
    threads: int
    device: str = "cpu"
    optimum_python: str | None = None


@dataclass(frozen=True)
class Task:
    """One report to write.

    Attributes:
        image: the radiograph.
        context: in the prompt.
        tokens: to write, whatever the model thinks of stopping.
        stand_in: a prompt of the usual length for what reads no embeddings: a token for each of the image's.
    """

    image: Path
    context: ClinicalContext
    tokens: int
    stand_in: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One report: seconds of the whole, of the language model alone (prefill and decode), and the text written."""

    whole: float
    language: float
    text: str


Runner = Callable[[Task], Run]
Study = tuple[Path, ClinicalContext]  # a radiograph, and what is told of it


def see(generator: ReportGenerator, image: Path, context: ClinicalContext) -> tuple[ImageReading, np.ndarray]:
    """What cbedge's image side makes of a radiograph, and the prompt for it, int64 [1, tokens]."""
    from cbedge.drafting.query import read_images
    from cbedge.images.preprocess import preprocess_radiograph
    from cbedge.images.radiograph import load_radiograph
    from cbedge.prompt import build_prompt

    manifest, codec = generator.bundle.manifest, generator.resources.codec
    pixels = preprocess_radiograph(load_radiograph(image), manifest.preprocessing)
    features = [generator.backend.encode_image(pixels)]
    reading = read_images(generator.backend, codec, manifest.image_findings, features, context)
    return reading, np.array([codec.encode_prompt(build_prompt(context, reading.findings))], np.int64)


def cbedge_runner(job: Job, variant: str, guesses: str = "") -> Runner:
    """cbedge's own graphs.

    ``guesses`` are the ``phrasebook``'s, which change no token; or the ``template``'s that is usual for the indication,
    to which the report is kept then, as users get it; or none, one token a pass.
    """
    from cbedge.api import ReportGenerator
    from cbedge.decoding import GuessLength, decode
    from cbedge.drafting.plan import plan_draft

    generator = ReportGenerator.from_pretrained(job.bundle, variant, job.device, job.threads)
    length = GuessLength()

    def write(task: Task, decoder: Decoder, logits: np.ndarray, reading: ImageReading) -> Iterator[Token]:
        constraint = None
        if guesses == "template":
            plain = replace(reading, findings=())  # kept to the usual template, whatever the image shows
            manifest = generator.bundle.manifest
            constraint = plan_draft(plain, task.context, generator.decoding, manifest, generator.resources).constraint
        guesser = generator.resources.phrasebook if guesses else None
        return decode(decoder, logits, (), task.tokens, constraint=constraint, guesser=guesser, guess_length=length)

    def run(task: Task) -> Run:
        start = perf_counter()
        reading, ids = see(generator, task.image, task.context)
        language = perf_counter()
        embeds = np.concatenate([reading.image_embeds, generator.backend.embed_tokens(ids)], axis=1)
        decoder = generator.backend.new_decoder(embeds.shape[1] + task.tokens)
        logits = decoder.prefill(embeds)
        written = [token.id for token in write(task, decoder, logits, reading)]
        end = perf_counter()
        return Run(end - start, end - language, generator.resources.codec.decode(written))

    return run


def transformers_runner(job: Job, kind: str) -> Runner:
    """transformers' ``generate`` on the merged model: ``fp32``, ``bf16``, or ``nf4`` by bitsandbytes."""
    import torch

    from cbedge.images.preprocess import preprocess_radiograph
    from cbedge.images.radiograph import load_radiograph
    from training.base import load_model
    from training.batches import encode_instructions, encode_prompt
    from training.stages import embed_inputs, encode_images, query_image

    torch.set_num_threads(job.threads)
    parts = load_model(str(job.checkpoint), job.checkpoint, kind)
    head, device = parts.finding_head, torch.device(job.device)
    model, dtype = parts.model.eval(), torch.float32 if kind == "fp32" else torch.bfloat16
    if kind != "nf4":  # which bitsandbytes has put where it belongs
        model.to(device)

    @torch.inference_mode()
    def run(task: Task) -> Run:
        start = perf_counter()
        values = preprocess_radiograph(load_radiograph(task.image), parts.preprocessing)
        pixels = torch.from_numpy(values).to(device, dtype)
        instruction = {k: v.to(device) for k, v in encode_instructions(parts, [task.context]).items()}
        output, projected = query_image(
            model, encode_images(model, pixels), instruction["input_ids"], instruction["attention_mask"]
        )
        seen = head.read(output)[0] if head else None
        ids = torch.tensor([encode_prompt(parts, task.context, seen)], device=device)
        language = perf_counter()
        embeds = embed_inputs(model, ids, projected)
        written = model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=device),
            do_sample=False,
            max_new_tokens=task.tokens,
            min_new_tokens=task.tokens,
            pad_token_id=parts.tokenizer.pad_token_id,
            eos_token_id=None,
        )
        text = parts.tokenizer.decode(written[0], skip_special_tokens=True)  # reads the tokens, so all is done
        end = perf_counter()
        return Run(end - start, end - language, text)

    return run


def genai_runner(job: Job) -> Runner:
    """ONNX Runtime GenAI on the language model alone, in its builder's own int4, fed a prompt of the same length."""
    import onnxruntime_genai as genai

    config = genai.Config(str(job.checkpoint / "genai"))
    model = genai.Model(config)

    def run(task: Task) -> Run:
        start = perf_counter()
        params = genai.GeneratorParams(model)
        total = len(task.stand_in) + task.tokens
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        writer = genai.Generator(model, params)
        writer.append_tokens(np.array([task.stand_in], np.int32))
        for _ in range(task.tokens):
            writer.generate_next_token()
        end = perf_counter()
        return Run(float("nan"), end - start, "")

    return run


def llama_cpp_runner(job: Job, kind: str) -> Runner:
    """llama.cpp on the language model alone, quantized by itself, fed a prompt of the same length."""
    from llama_cpp import Llama

    model = Llama(
        str(job.checkpoint / f"language-{kind}.gguf"),
        n_ctx=CONTEXT,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        verbose=False,
    )

    def run(task: Task) -> Run:
        start = perf_counter()
        model.reset()  # or it would remember the prompt
        tokens = model.generate(list(task.stand_in), temp=0.0, repeat_penalty=1.0)
        for _ in range(task.tokens):
            next(tokens)
        end = perf_counter()
        return Run(float("nan"), end - start, "")

    return run


def optimum_runner(job: Job) -> Runner:
    """Optimum's ONNX model of the language model alone, in fp32, fed a prompt of the same length, by its own python."""
    if job.optimum_python is None:
        raise ValueError("name an interpreter that has optimum-onnx: --optimum-python")
    told = {"folder": str(job.checkpoint / "optimum"), "threads": job.threads}
    script = Path(__file__).with_name("optimum_peer.py")
    process = subprocess.Popen(
        [job.optimum_python, str(script), json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    asked, answers = process.stdin, process.stdout
    assert asked is not None and answers is not None
    if answers.readline().strip() != "ready":
        raise RuntimeError(f"{job.optimum_python} did not export the model with optimum-onnx")

    def run(task: Task) -> Run:
        print(json.dumps({"ids": task.stand_in, "tokens": task.tokens}), file=asked, flush=True)
        return Run(float("nan"), float(answers.readline()), "")

    return run


RUNNERS: dict[str, Callable[[Job], Runner]] = {
    "cbedge q4a8": lambda job: cbedge_runner(job, "q4a8", "phrasebook"),
    "cbedge q4a8, kept to a template": lambda job: cbedge_runner(job, "q4a8", "template"),
    "cbedge q4a8, one token a pass": lambda job: cbedge_runner(job, "q4a8"),
    "cbedge int4": lambda job: cbedge_runner(job, "int4", "phrasebook"),
    "cbedge int4, kept to a template": lambda job: cbedge_runner(job, "int4", "template"),
    "cbedge int4, one token a pass": lambda job: cbedge_runner(job, "int4"),
    "cbedge fp32, one token a pass": lambda job: cbedge_runner(job, "fp32"),
    "onnxruntime-genai int4 (language model alone)": genai_runner,
    "llama.cpp Q4_0 (language model alone)": lambda job: llama_cpp_runner(job, "Q4_0"),
    "llama.cpp Q8_0 (language model alone)": lambda job: llama_cpp_runner(job, "Q8_0"),
    "Optimum ONNX fp32 (language model alone)": optimum_runner,
    "cbedge int8, one token a pass": lambda job: cbedge_runner(job, "int8"),
    "transformers fp32": lambda job: transformers_runner(job, "fp32"),
    "transformers bf16": lambda job: transformers_runner(job, "bf16"),
    "bitsandbytes NF4": lambda job: transformers_runner(job, "nf4"),
    "cbedge q4f16, one token a pass": lambda job: cbedge_runner(job, "q4f16"),
    "cbedge fp16, one token a pass": lambda job: cbedge_runner(job, "fp16"),
}
# Who runs where none is named; ratios are to the first.
USUAL = {
    "cpu": [name for name in RUNNERS if "16, one" not in name],
    "cuda": [
        "cbedge q4f16, one token a pass",
        "cbedge fp16, one token a pass",
        "transformers bf16",
        "bitsandbytes NF4",
    ],
}


def _serve(name: str, job: Job, first: Task, connection: Connection) -> None:
    """In a process of its own: load, then run whatever comes."""
    warnings.simplefilter("ignore")
    try:
        run = RUNNERS[name](job)
        run(first)  # warm-up
        connection.send("ready")
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    while (task := connection.recv()) is not None:
        connection.send(run(task))


def measure(job: Job, names: list[str], tasks: list[Task], tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs of every runner that loads, in turn, a task a round; why others do not."""
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    failed: dict[str, str] = {}
    for name in names:
        ours, theirs = context.Pipe()
        tell(f"loading {name}")
        process = context.Process(target=_serve, args=(name, job, tasks[0], theirs), daemon=True)
        process.start()
        theirs.close()  # or one that dies without a word would be waited for
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
            run = line.recv()
            runs[name].append(run)
            tell(f"round {number + 1} of {len(tasks)}: {name}: {run.whole:.3f} s, language model {run.language:.3f} s")
    for line in lines.values():
        line.send(None)
    return {"runs": {name: [asdict(run) for run in found] for name, found in runs.items()}, "failed": failed}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians, and the ratio to the first runner, round by round."""
    ours = next(iter(runs.values()), None)
    rows = {}
    for name, found in runs.items():
        row: dict[str, Any] = {}
        for part in ("whole", "language"):
            seconds = [run[part] for run in found]
            row[f"{part}_s"] = statistics.median(seconds)
            if ours:
                ratios = [s / o[part] for s, o in zip(seconds, ours, strict=True)]
                row[f"{part}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        row |= _agreement(runs, found)
        rows[name] = row
    return rows


def _agreement(runs: dict[str, list[dict[str, Any]]], found: list[dict[str, Any]]) -> dict[str, float | None]:
    """How many characters a runner writes before it first differs from transformers in fp32, the median of its rounds;
    and in how many rounds it does not differ."""
    exact = runs.get("transformers fp32")
    if not exact or not found[0]["text"]:
        return {"same_characters_as_fp32": None, "same_texts_as_fp32": None}
    pairs = [(ours["text"], theirs["text"]) for ours, theirs in zip(found, exact, strict=True)]
    same = [sum(1 for _ in takewhile(lambda at: at[0] == at[1], zip(*pair, strict=False))) for pair in pairs]
    return {"same_characters_as_fp32": statistics.median(same), "same_texts_as_fp32": sum(a == b for a, b in pairs)}


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    where = record["machine"]
    lines = [
        f"# {_title(record)}, {record['rounds']} rounds in turn",
        "",
        f"{where['date']}, {where['gpu'] or where['processor']}, {record['threads']} threads, "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + f". Command: `{record['command']}`",
        "",
        "Seconds are medians; ratios to the first row, round by round: median (least to most).",
        "",
        "| | whole report, s | ratio | language model, s | ratio | characters like fp32's (equal texts) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in record["summary"].items():
        cells = []
        for part in ("whole", "language"):
            known = row[f"{part}_s"] == row[f"{part}_s"]
            ratio = row.get(f"{part}_ratio")
            cells.append(f"{row[f'{part}_s']:.3f}" if known else "-")
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) if known and ratio else "-")
        same = row["same_characters_as_fp32"]
        agreed = "-" if same is None else f"{same:.0f} ({row['same_texts_as_fp32']} of {record['rounds']})"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {agreed} |")
    lines += [f"\n{name} did not run: {reason}" for name, reason in record["failed"].items()]
    return "\n".join(lines) + "\n"


def _title(record: dict[str, Any]) -> str:
    """What was written."""
    least, middle, most = record["tokens"]
    if least == most:
        return f"One report of {middle:.0f} tokens"
    return f"Reports of {record['rounds']} studies, {least} to {most} tokens, median {middle:.0f}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Seconds of every runner as bars, PNG: the whole report, and in front of it the language model's part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["summary"]
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.4 * len(rows)))
    for part, colour, label in (("whole_s", "#c5d5ea", "whole report"), ("language_s", "#2f5d8a", "language model")):
        axes.barh(list(rows), [row[part] for row in rows.values()], color=colour, label=label)
    for at, row in enumerate(rows.values()):
        longest = max(v for v in (row["whole_s"], row["language_s"]) if v == v)
        axes.text(longest, at, f" {longest:.2f}", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="seconds, median", title=f"{_title(record)}, {record['threads']} threads")
    axes.legend(fontsize="small", loc="upper right")
    axes.margins(x=0.1)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def prepare(
    checkpoint: str | None,
    adapters: Path | None,
    bundle: Path,
    folder: Path,
    names: list[str],
    tell: Callable[[str], None],
) -> Path:
    """Write the merged model, its language model alone, and that for GenAI and llama.cpp where they are among the
    ``names``, into ``folder``; returns where the model lies, which is the checkpoint itself where nothing is merged.

    The model is the bundle's own, restored from its fp32 graphs, where no checkpoint is given.
    """
    from export.merge import merge
    from export.restore import restore
    from training.fetch import DEFAULT_CACHE
    from training.trained import load_adapted

    alone = any("alone" in name for name in names)
    if checkpoint and adapters is None and not alone and Path(checkpoint).is_dir():
        return Path(checkpoint)
    tell("merging" if checkpoint else "restoring")
    if checkpoint:
        parts = load_adapted(checkpoint, [adapters] if adapters else [], DEFAULT_CACHE)
        merge(parts)
    else:
        parts = restore(open_bundle(bundle), "fp32")
    language = parts.model.language_model
    if getattr(language.config, "quantization_config", None) is not None:
        del language.config.quantization_config  # how the base weights came, not how they are now
    parts.save(folder)
    if not alone:
        return folder
    language.save_pretrained(folder / "language")
    parts.tokenizer.save_pretrained(folder / "language")
    if is_installed("llama-cpp-python"):
        from benchmarks.gguf import quantize, write_gguf

        tell("writing GGUF for llama.cpp")
        write_gguf(folder / "language", folder / "language.gguf")
        for kind in ("Q4_0", "Q8_0"):
            quantize(folder / "language.gguf", folder / f"language-{kind}.gguf", kind)
    _copy_for_optimum(folder / "language", folder / "optimum")
    tell("building onnxruntime-genai's int4")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(folder / "language"),
        "-o",
        str(folder / "genai"),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(folder / "cache"),
        "--extra_options",
        "int4_accuracy_level=4",
    ]
    subprocess.run(command, check=False, capture_output=True)
    return folder


def natural_lengths(bundle: Path, studies: list[Study], threads: int) -> list[int]:
    """Of how many tokens the reports are that the bundle's ``fp32`` writes, their ends counted."""
    from cbedge.api import ReportGenerator
    from cbedge.decoding import decode

    generator = ReportGenerator.from_pretrained(bundle, "fp32", "cpu", threads)
    manifest, backend = generator.bundle.manifest, generator.backend
    most, lengths = manifest.decoding["max_new_tokens"], []
    for image, context in studies:
        reading, ids = see(generator, image, context)
        embeds = np.concatenate([reading.image_embeds, backend.embed_tokens(ids)], axis=1)
        decoder = backend.new_decoder(embeds.shape[1] + most)
        lengths.append(sum(1 for _ in decode(decoder, decoder.prefill(embeds), manifest.stop_ids, most)))
    return lengths


def plan(bundle: Path, studies: list[Study], tokens: int | None, threads: int) -> list[Task]:
    """The reports to write: of so many tokens, or of as many as the bundle's ``fp32`` writes until each ends."""
    opened = open_bundle(bundle)
    tokenizer, manifest = Tokenizer.from_file(str(opened.folder / TOKENIZER)), opened.manifest
    if tokens:
        lengths = [tokens] * len(studies)
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as aside:  # its memory ends with it
            lengths = aside.submit(natural_lengths, bundle, studies, threads).result()
    image_ids = (*[5] * manifest.shapes.num_query_tokens, *manifest.prefix_ids)
    tasks = []
    for (image, context), length in zip(studies, lengths, strict=True):
        prompt = tokenizer.encode(build_prompt(context, ()), add_special_tokens=False)
        tasks.append(Task(image, context, length, (*image_ids, *prompt.ids, *manifest.suffix_ids)))
    return tasks


def _copy_for_optimum(language: Path, folder: Path) -> None:
    """The language model as transformers below 5 read it: they look for the positions' base elsewhere."""
    shutil.copytree(language, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _chosen(device: str, only: list[str] | None, optimum_python: str | None) -> list[str]:
    """Who runs.

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
    if output.with_suffix(".json").exists() and not force:
        typer.echo(f"error: {output.with_suffix('.json')} exists already: give --force to replace it", err=True)
        raise typer.Exit(1)
    try:
        names = _chosen(device, only, optimum_python)
        studies = rounds * [(image.absolute(), ClinicalContext(indication, view="frontal"))]
        if data is None:
            tokens = tokens or 60
        else:
            studies = [(s.image.absolute(), s.context) for s in open_studies(data, ("val",), rounds)]
            if not studies:
                raise ValueError(f"{data} has no validation study")
        open_bundle(bundle).variant(None if tokens else "fp32")
    except (CbedgeError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    with tempfile.TemporaryDirectory() as scratch:
        model = prepare(checkpoint, adapters, bundle, Path(scratch), names, tell)
        job = Job(model.absolute(), bundle.absolute(), threads, device, optimum_python)
        tasks = plan(job.bundle, studies, tokens, threads)
        found = measure(job, names, tasks, tell)
    packages = (
        "torch",
        "transformers",
        "bitsandbytes",
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-genai",
        "llama-cpp-python",
    )
    record = {
        "machine": machine(),
        "versions": {name: version(name) for name in packages if is_installed(name)},
        "tokens": [pick(task.tokens for task in tasks) for pick in (min, statistics.median, max)],
        "rounds": len(tasks),
        "threads": threads,
        "summary": summarize(found["runs"]),
        "failed": found["failed"],
        "command": f"python -m benchmarks.peers --device {device} {'--data IU_XRAY' if data else f'--tokens {tokens}'} "
        f"--rounds {rounds} --threads {threads} …",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
    plot(record, output.with_suffix(".png"))
    typer.echo(to_markdown(record))


if __name__ == "__main__":
    app()
