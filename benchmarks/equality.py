"""``python -m benchmarks.equality``: a released InstructBLIP here and in transformers, on the same files and prompts.

Tiny checkpoints of random weights in the released layouts (:mod:`benchmarks.released_layout`) go through what a user
does: loaded as they are, through ``python -m training run`` without a stage and with one step of each kind of stage,
and through ``python -m export`` in fp32 and int4. Each is compared with ``InstructBlipProcessor`` and
``InstructBlipForConditionalGeneration``: pixel values, token ids, vision features, Q-Former output, image embeddings,
logits of the first token, and the tokens of greedy decoding. Both sides are given the same text as prompt and as the
Q-Former's instruction.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from benchmarks.released_layout import FAMILIES, write_released
from cbedge import ReportGenerator
from cbedge.bench import machine
from cbedge.decoding import decode
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from training.base import ModelAndTokenizers, load_model
from training.special_tokens import prefix_ids, start_ids, suffix_ids
from training.stages import embed_inputs, encode_images, query_image
from training.trained import load_adapted, merge_adapters

GREEDY_TOKENS = 32
PROMPTS = (
    "\nDescribe the chest radiograph. View: frontal. Indication: cough and fever.\nReport:\n",
    "Is there a fracture?",
    "  FINDINGS: x-ray of Größe 12 µm;  two  spaces\n",
)
SIZES = {"vicuna": (224, 14), "flan-t5": (336, 16)}  # image and patch
_TARGETS = {"vicuna": "[q_proj, v_proj]", "flan-t5": "[q, v, wi_0, wo]"}
_RUN = """
base: {base}
data: {data}
output: {output}
stages:
  - name: align
    train: [qformer, query_tokens, projection]
    losses: {{contrastive: 1.0, tags: 1.0, words: 1.0}}
    cached_views: 1
    batch_size: 4
  - name: wording
    lora: {{part: language, r: 4, alpha: 8, targets: {targets}}}
    losses: {{language: 1.0}}
    image_blind: true
    batch_size: 4
  - name: vision
    train: [qformer, query_tokens, projection]
    lora: {{part: vision, r: 4, alpha: 8, targets: [qkv, projection, fc1, fc2]}}
    losses: {{language: 1.0, tags: 1.0}}
    batch_size: 4
  - name: language
    train: [projection]
    lora: {{part: language, r: 4, alpha: 8, targets: {targets}}}
    losses: {{language: 1.0}}
    tell_findings: [cardiomegaly, effusion]
    cached_views: 1
    batch_size: 4
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Answer:
    """What a model makes of one file and prompt.

    Attributes:
        pixel_values: float32 [1, 3, S, S].
        input_ids: image placeholders left out, those around the prompt among them.
        qformer_ids: of the instruction.
        features: of the vision encoder, float32 [1, P, H].
        queried: the Q-Former's output of the queries, float32 [1, Q, H]; ``None`` where a graph does not hand it out.
        image_embeds: the same projected, float32 [1, Q, D].
        logits: of the first token, float32 [V].
        tokens: up to 32 greedy ones, the stop token among them.
    """

    pixel_values: np.ndarray
    input_ids: list[int]
    qformer_ids: list[int]
    features: np.ndarray
    queried: np.ndarray | None
    image_embeds: np.ndarray
    logits: np.ndarray
    tokens: list[int]


@dataclass(frozen=True)
class Equality:
    """The largest difference from transformers over some cases.

    Attributes:
        model: what was compared.
        cases: files times prompts.
        pixel_values: largest absolute difference.
        ids: cases whose token ids are equal, of the prompt and of the Q-Former's instruction.
        features, queried, image_embeds, logits: Euclidean norm of the difference as a share of transformers'.
        first_token, tokens: cases whose first token, or all 32 tokens, are equal.
    """

    model: str
    cases: int
    pixel_values: float
    ids: int
    features: float
    queried: float | None
    image_embeds: float
    logits: float
    first_token: int
    tokens: int


class Reference:
    """A checkpoint in transformers: its processor and its model.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path):
        self.processor = InstructBlipProcessor.from_pretrained(folder)
        self.model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._vocabulary = self.model.config.text_config.vocab_size
        if self.processor.num_query_tokens is None:  # of an early release, as transformers' own message tells to do
            self.processor.num_query_tokens = self.model.config.num_query_tokens
            self.model.resize_token_embeddings(len(self.processor.tokenizer))
            self.model.config.image_token_index = len(self.processor.tokenizer) - 1

    @torch.inference_mode()
    def answer(self, image: Path, prompt: str) -> Answer:
        """What transformers makes of a file and a prompt."""
        inputs = self.processor(images=Image.open(image), text=prompt, return_tensors="pt")
        decoder_only = self.model.config.use_decoder_only_language_model
        first = {} if decoder_only else {"decoder_input_ids": torch.tensor([[self._start]])}
        out = self.model(**inputs, **first)
        count = self.model.config.num_query_tokens
        queried = out.qformer_outputs.last_hidden_state[:, :count]
        written = self.model.generate(**inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False)[0].tolist()
        ids = inputs["input_ids"][0].tolist()
        read = ids if decoder_only else [self._start]
        if written[: len(read)] == read:
            written = written[len(read) :]
        return Answer(
            inputs["pixel_values"].numpy(),
            ids[count:],
            inputs["qformer_input_ids"][0].tolist(),
            out.vision_outputs.last_hidden_state.numpy(),
            queried.numpy(),
            self.model.language_projection(queried).numpy(),
            out.logits[0, -1, : self._vocabulary].numpy(),
            written,
        )

    @property
    def _start(self) -> int:
        return self.model.language_model.generation_config.decoder_start_token_id


@torch.inference_mode()
def in_torch(parts: ModelAndTokenizers, image: Path, prompt: str) -> Answer:
    """What training makes of a file and a prompt; its tokens are transformers' of its own input embeddings."""
    model = parts.model.eval()
    pixels = preprocess_radiograph(load_radiograph(image), parts.preprocessing)
    features = encode_images(model, torch.from_numpy(pixels))
    words = parts.qformer_tokenizer(prompt, return_tensors="pt")
    queried, projected = query_image(model, features, words["input_ids"], words["attention_mask"])
    text = parts.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = [*prefix_ids(parts), *text, *suffix_ids(parts)]
    placeholders = [parts.image_token_id] * model.config.num_query_tokens
    embeds = embed_inputs(model, torch.tensor([placeholders + ids]), projected)
    language, start = model.language_model, start_ids(parts)
    first = {"decoder_input_ids": torch.tensor([start])} if start else {}
    logits = language(inputs_embeds=embeds, **first).logits[0, -1]
    written = language.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )[0, len(start) :].tolist()
    return Answer(
        pixels,
        ids,
        words["input_ids"][0].tolist(),
        features.numpy(),
        queried.numpy(),
        projected.numpy(),
        logits.numpy(),
        written,
    )


def in_bundle(generator: ReportGenerator, image: Path, prompt: str) -> Answer:
    """What the runtime makes of a file and a prompt."""
    backend, manifest = generator.backend, generator.bundle.manifest
    pixels = preprocess_radiograph(load_radiograph(image), manifest.preprocessing)
    features = backend.encode_image(pixels)
    codec = generator.resources.codec
    words, ids = codec.encode_instruction(prompt), codec.encode_prompt(prompt)
    embeds = backend.query_image(features, np.array([words], np.int64)).embeds
    read = np.concatenate([embeds, backend.embed_tokens(np.array([ids], np.int64))], axis=1)
    decoder = backend.new_decoder(read.shape[1] + GREEDY_TOKENS + 1)
    logits = decoder.prefill(read).copy()
    written = [token.id for token in decode(decoder, logits, manifest.stop_ids, GREEDY_TOKENS)]
    return Answer(pixels, ids, words, features, None, embeds, logits, written)


def compare(name: str, references: list[Answer], answers: list[Answer]) -> Equality:
    """Sum up the differences of answers from transformers', case by case."""
    pairs = list(zip(references, answers, strict=True))

    def largest(kind: str) -> float:
        return max(_relative(getattr(theirs, kind), getattr(ours, kind)) for theirs, ours in pairs)

    return Equality(
        name,
        len(pairs),
        pixel_values=max(float(np.abs(a.pixel_values - b.pixel_values).max()) for a, b in pairs),
        ids=sum(a.input_ids == b.input_ids and a.qformer_ids == b.qformer_ids for a, b in pairs),
        features=largest("features"),
        queried=None if answers[0].queried is None else largest("queried"),
        image_embeds=largest("image_embeds"),
        logits=largest("logits"),
        first_token=sum(a.tokens[:1] == b.tokens[:1] for a, b in pairs),
        tokens=sum(a.tokens == b.tokens for a, b in pairs),
    )


def _relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    ours = ours[..., : theirs.shape[-1]]  # an early release's head gets a row more, for the image token
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def draw_films(folder: Path) -> list[Path]:
    """Films of the full range 0..255, drawn: grey and in colours, PNG and JPEG, of several shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, rows, columns) in enumerate(
        (("grey.png", 300, 250), ("wide.jpg", 200, 400), ("colour.png", 224, 224), ("colour.jpg", 350, 210))
    ):
        y, x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns])[:, None, None]
        rng = np.random.default_rng(number)
        plane = 0.8 + 0.05 * rng.standard_normal((rows, columns))
        for centre in (0.3, 0.7):
            plane -= 0.6 * np.exp(-((((x - centre) / 0.13) ** 2 + ((y - 0.5) / (0.2 + 0.05 * number)) ** 2) ** 2))
        grey = (255 * (plane - plane.min()) / (plane.max() - plane.min())).astype(np.uint8)
        image = Image.fromarray(grey)
        if name.startswith("colour"):
            image = Image.fromarray(np.stack([grey, 255 - grey, grey // 2 + 64], axis=2))
        image.save(folder / name)
        paths.append(folder / name)
    return paths


def write_collection(folder: Path, films: list[Path]) -> Path:
    """A collection of drawn films in the layout of ``studies.jsonl``, to take single training steps on."""
    reports = (
        ("The heart is normal in size. The lungs are clear.", "No acute disease.", ["normal"]),
        (
            "The heart is enlarged. There is a small left pleural effusion.",
            "Cardiomegaly and effusion.",
            ["Cardiomegaly/mild", "Pleural Effusion/left"],
        ),
    )
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, split in enumerate(["train"] * 8 + ["val"] * 4):
        film, (findings, impression, tags) = films[number % len(films)], reports[number % 2]
        file = f"{number}{film.suffix}"
        (folder / "images" / file).write_bytes(film.read_bytes())
        lines.append(
            json.dumps(
                {
                    "study_id": f"S{number}",
                    "split": split,
                    "r2gen_id": f"S{number}",
                    "images": [{"file": file, "view": "frontal", "columns": 200, "rows": 240}],
                    "indication": "cough",
                    "comparison": None,
                    "exam": "Chest",
                    "findings": findings,
                    "impression": impression,
                    "mesh_major": tags,
                    "mesh_automatic": [],
                    "problems": [],
                }
            )
        )
    (folder / "studies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measure(folder: Path, family: str, films: list[Path], size: int, patch: int) -> Iterator[Equality]:
    """Compare one family's checkpoint all the way.

    Args:
        folder: new, for what is made on the way: ``base``, runs ``untrained`` and ``trained``, their bundles.
        family: of :data:`benchmarks.released_layout.FAMILIES`.
        films: files to read.
        size, patch: of the vision encoder's images, in pixels.
    """
    base = write_released(folder / "base", family, image_size=size, patch_size=patch)
    cases = [(film, prompt) for film in films for prompt in PROMPTS]
    references = [Reference(base).answer(*case) for case in cases]
    parts = load_model(str(base), folder)
    yield compare("checkpoint, in torch", references, [in_torch(parts, *case) for case in cases])
    data = write_collection(folder / "data", films)
    for name, stages in (("run without a stage", False), ("one step of each stage", True)):
        run = _train(folder / ("trained" if stages else "untrained"), family, base, data, stages)
        if stages:
            parts = load_adapted(str(base), [run], folder)
            merge_adapters(parts)
            parts.save(folder / "merged")
            references = [Reference(folder / "merged").answer(*case) for case in cases]
            again = load_model(str(folder / "merged"), folder)
            yield compare(f"{name}, in torch", references, [in_torch(again, *case) for case in cases])
        out = folder / f"{run.name}-bundle"
        _command(
            "export",
            "--checkpoint",
            base,
            "--adapters",
            run,
            "--out",
            out,
            "--variant",
            "fp32",
            "--variant",
            "int4",
            "--algorithm",
            "rtn",
        )
        for variant in ("fp32", "int4"):
            generator = ReportGenerator.from_pretrained(out, variant, "cpu")
            answers = [in_bundle(generator, *case) for case in cases]
            yield compare(f"{name}, exported in {variant}", references, answers)


def _train(folder: Path, family: str, base: Path, data: Path, stages: bool) -> Path:
    config = _RUN.format(base=base, data=data, output=folder, targets=_TARGETS[family])
    if not stages:
        config = config[: config.index("stages:")] + "stages: []\n"
    path = folder.with_suffix(".yaml")
    path.write_text(config, encoding="utf-8")
    _command("training", "run", "--config", path, "--data", data, "--output", folder, "--max-steps", 1)
    return folder


def _command(module: str, *arguments: object) -> None:
    """``python -m MODULE ARGUMENTS`` in this process, which has loaded torch already."""
    import importlib

    command = typer.main.get_command(importlib.import_module(f"{module}.__main__").app)
    command.main([str(argument) for argument in arguments], standalone_mode=False)


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# A released InstructBLIP here and in transformers",
        "",
        f"`{record['command']}`, commit {record['commit']}, {record['machine']['date']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        "",
        "Tiny checkpoints of random weights in the released layouts; the same files (grey and colour, PNG and JPEG, "
        f"four shapes) and the same {len(PROMPTS)} prompts for `InstructBlipProcessor` with "
        "`InstructBlipForConditionalGeneration` and for cbedge. The prompt is the Q-Former's instruction too, as in "
        "transformers. Given are the largest differences over all cases: pixel values absolute, the rest the Euclidean "
        "norm of the difference as a share of transformers'. int4 differs by what quantization loses.",
        "",
    ]
    for family, rows in record["families"].items():
        size, patch = SIZES[family]
        lines += [
            f"## {family}: {size} pixels, patches of {patch}",
            "",
            "| cbedge | pixel values | token ids | vision features | Q-Former | image embeddings | first token's "
            "logits | first token | 32 greedy tokens |",
            "| --- |" + " ---: |" * 8,
        ]
        for row in rows:
            queried = "not handed out" if row["queried"] is None else f"{row['queried']:.1e}"
            lines.append(
                f"| {row['model']} | {row['pixel_values']:.1e} | {row['ids']} of {row['cases']} | "
                f"{row['features']:.1e} | {queried} | {row['image_embeds']:.1e} | {row['logits']:.1e} | "
                f"{row['first_token']} of {row['cases']} | {row['tokens']} of {row['cases']} |"
            )
        lines.append("")
    return "\n".join(lines)


@app.command(help=__doc__)
def main(
    output: Annotated[Path | None, typer.Option(help="Write NAME.json and NAME.md; NAME with its folder.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="vicuna or flan-t5.", show_default="both")] = None,
) -> None:
    """Measure, print, record."""
    unknown = [name for name in family or () if name not in FAMILIES]
    if unknown:
        typer.echo(f"error: unknown family {unknown[0]!r}; give one of: {', '.join(FAMILIES)}", err=True)
        raise typer.Exit(1)
    families: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        films = draw_films(Path(scratch) / "films")
        for name in family or FAMILIES:
            families[name] = []
            for row in measure(Path(scratch) / name, name, films, *SIZES[name]):
                typer.echo(f"{name}: {row}", err=True)
                families[name].append(asdict(row))
    record = {
        "command": "python -m benchmarks.equality",
        "commit": _commit(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("transformers", "torch", "onnxruntime", "pillow", "tokenizers")},
        "families": families,
    }
    text = to_markdown(record)
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(text, encoding="utf-8")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    app()
