"""cbedge and its peers, each as a function that writes one report; :mod:`benchmarks.peers` compares them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from cbedge.decoding import Decoder, Token
from cbedge.prompt import ClinicalContext, build_prompt

if TYPE_CHECKING:
    from cbedge.api import ReportGenerator
    from cbedge.findings.reading import ImageReading

CONTEXT = 512  # positions that llama.cpp allocates, its own default


@dataclass(frozen=True)
class Job:
    """The model that every runner loads, and how it runs.

    Attributes:
        checkpoint: folder of the merged model in transformers' format, with its language model for the other peers:
            ``language``, ``genai`` (ONNX Runtime GenAI), ``optimum``, and ``language-*.gguf`` (llama.cpp).
        optimum_python: a Python interpreter with optimum-onnx.
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
        tokens: number of tokens to write; stop tokens are ignored.
        stand_in: token ids of a prompt of the same length, for peers that cannot read embeddings.
    """

    image: Path
    context: ClinicalContext
    tokens: int
    stand_in: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One report: seconds in total, seconds of the language model (prefill and decode), and the text."""

    whole: float
    language: float
    text: str


Runner = Callable[[Task], Run]
Study = tuple[Path, ClinicalContext]


def read_image(generator: ReportGenerator, image: Path, context: ClinicalContext) -> tuple[ImageReading, np.ndarray]:
    """What vision encoder and Q-Former of a bundle give for a radiograph, and the prompt, int64 [1, tokens]."""
    from cbedge.drafting.query import read_images
    from cbedge.images.preprocess import preprocess_radiograph
    from cbedge.images.radiograph import load_radiograph

    manifest, codec = generator.bundle.manifest, generator.resources.codec
    pixels = preprocess_radiograph(load_radiograph(image), manifest.preprocessing)
    features, findings = [generator.backend.encode_image(pixels)], manifest.image_findings
    reading = read_images(generator.backend, codec, findings, features, context, generator.finding_reader)
    prompted = findings.prompted(reading.findings) if findings and reading.findings is not None else None
    return reading, np.array([codec.encode_prompt(build_prompt(context, prompted))], np.int64)


def cbedge_runner(job: Job, variant: str, guesses: str = "") -> Runner:
    """cbedge with a variant of the bundle.

    ``guesses`` is ``phrasebook``, which changes no token; ``template``, with which the report follows the usual
    template of the indication, as for users; or empty: one token in each pass.
    """
    from cbedge.api import ReportGenerator
    from cbedge.decoding import GuessLength, decode
    from cbedge.drafting.plan import plan_draft

    generator = ReportGenerator.from_pretrained(job.bundle, variant, job.device, job.threads)
    length = GuessLength()

    def write(task: Task, decoder: Decoder, logits: np.ndarray, reading: ImageReading) -> Iterator[Token]:
        constraint = None
        if guesses == "template":
            plain = replace(reading, findings=())  # follows the usual template, whatever the image shows
            manifest = generator.bundle.manifest
            constraint = plan_draft(plain, task.context, generator.decoding, manifest, generator.resources).constraint
        guesser = generator.resources.phrasebook if guesses else None
        return decode(decoder, logits, (), task.tokens, constraint=constraint, guesser=guesser, guess_length=length)

    def run(task: Task) -> Run:
        start = perf_counter()
        reading, ids = read_image(generator, task.image, task.context)
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
    if kind != "nf4":  # bitsandbytes has placed it already
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
        text = parts.tokenizer.decode(written[0], skip_special_tokens=True)  # waits for the tokens
        end = perf_counter()
        return Run(end - start, end - language, text)

    return run


def genai_runner(job: Job) -> Runner:
    """ONNX Runtime GenAI: the language model only, in int4 by its builder, with a prompt of the same length."""
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
    """llama.cpp: the language model only, quantized by llama.cpp, with a prompt of the same length."""
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
        model.reset()  # it caches the prompt otherwise
        tokens = model.generate(list(task.stand_in), temp=0.0, repeat_penalty=1.0)
        for _ in range(task.tokens):
            next(tokens)
        end = perf_counter()
        return Run(float("nan"), end - start, "")

    return run


def optimum_runner(job: Job) -> Runner:
    """Optimum: the language model only, in fp32, with a prompt of the same length, in another Python."""
    if job.optimum_python is None:
        raise ValueError("Optimum needs --optimum-python, an interpreter that has optimum-onnx")
    settings = {"folder": str(job.checkpoint / "optimum"), "threads": job.threads}
    script = Path(__file__).with_name("optimum_peer.py")
    process = subprocess.Popen(
        [job.optimum_python, str(script), json.dumps(settings)],
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
# Runners by default on each device; ratios are to the first.
USUAL = {
    "cpu": [name for name in RUNNERS if "16, one" not in name],
    "cuda": [
        "cbedge q4f16, one token a pass",
        "cbedge fp16, one token a pass",
        "transformers bf16",
        "bitsandbytes NF4",
    ],
}
