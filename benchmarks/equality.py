"""Compare a released InstructBLIP in cbedge with the same in transformers, on the same files and prompts.

Tiny checkpoints of random weights in the released layouts (``benchmarks.released_layout``) take the path of a user:
loaded as they are, through ``python -m training run`` without a stage and with one step of each kind of stage, and
through ``python -m export`` in fp32 and int4. Each is compared with ``InstructBlipProcessor`` and
``InstructBlipForConditionalGeneration``: pixel values, token ids, vision features, Q-Former output, image embeddings,
logits of the first token, and the tokens of greedy decoding. Both sides get the same text as prompt and as instruction
of the Q-Former.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import write_record
from benchmarks.drawn_studies import draw_films, write_collection
from benchmarks.equality_answers import Answer, Reference, in_bundle, in_torch
from benchmarks.released_layout import FAMILIES, write_released
from cbedge import ReportGenerator
from cbedge.provenance import provenance
from training.base import load_model
from training.trained import load_adapted, merge_adapters

PACKAGES = ("transformers", "torch", "onnxruntime", "pillow", "tokenizers")
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
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Equality:
    """The largest differences from transformers over all cases.

    Attributes:
        model: what was compared.
        cases: number of files times number of prompts.
        pixel_values: largest absolute difference.
        ids: number of cases with equal token ids, both of the prompt and of the Q-Former's instruction.
        features, queried, image_embeds, logits: largest relative error, by Euclidean norm.
        first_token, tokens: number of cases with an equal first token, or with all tokens equal.
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


def compare(name: str, references: list[Answer], answers: list[Answer]) -> Equality:
    """The differences of the answers from those of transformers."""
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
    ours = ours[..., : theirs.shape[-1]]  # an early release gets one more row, for the image token
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def measure(folder: Path, family: str, films: list[Path], size: int, patch: int) -> Iterator[Equality]:
    """Compare the checkpoint of one family after each step.

    Args:
        folder: a new folder for the checkpoint ``base``, the runs ``untrained`` and ``trained``, and their bundles.
        family: one of :data:`benchmarks.released_layout.FAMILIES`.
    """
    base = write_released(folder / "base", family, image_size=size, patch_size=patch)
    cases = [(film, prompt) for film in films for prompt in PROMPTS]
    references = [Reference(base).answer(*case) for case in cases]
    parts = load_model(str(base), folder)
    yield compare("checkpoint, in torch", references, [in_torch(parts, *case) for case in cases])
    data = write_collection(folder / "data", films, ["train"] * 8 + ["val"] * 4)
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
        options = ["--checkpoint", base, "--adapters", run, "--out", out, "--algorithm", "rtn"]
        _command("export", *options, "--variant", "fp32", "--variant", "int4")
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
    """``python -m MODULE ARGUMENTS`` in this process, which has already loaded torch."""
    command = typer.main.get_command(importlib.import_module(f"{module}.__main__").app)
    command.main([str(argument) for argument in arguments], standalone_mode=False)


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# A released InstructBLIP here and in transformers",
        "",
        f"`{record['command']}`, commit {record['commit'][:7]}, {record['machine']['date']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        "",
        "Tiny checkpoints of random weights in the released layouts; the same files (grey and colour, PNG and JPEG, "
        f"four shapes) and the same {len(PROMPTS)} prompts for `InstructBlipProcessor` with "
        "`InstructBlipForConditionalGeneration` and for cbedge. The prompt is also the Q-Former's instruction, as in "
        "transformers. The table has the largest differences over all cases: absolute for pixel values, relative "
        "(Euclidean norm) for the others. int4 differs by its quantization error.",
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
            queried = "not returned" if row["queried"] is None else f"{row['queried']:.1e}"
            lines.append(
                f"| {row['model']} | {row['pixel_values']:.1e} | {row['ids']} of {row['cases']} | "
                f"{row['features']:.1e} | {queried} | {row['image_embeds']:.1e} | {row['logits']:.1e} | "
                f"{row['first_token']} of {row['cases']} | {row['tokens']} of {row['cases']} |"
            )
        lines.append("")
    return "\n".join(lines)


@app.command(help=__doc__)
def main(
    output: Annotated[Path | None, typer.Option(help="Record to write: OUTPUT.json and OUTPUT.md.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="vicuna or flan-t5.", show_default="both")] = None,
) -> None:
    """Measure, print and record."""
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
    record = provenance("drawn films", packages=PACKAGES, bundle=False) | {"families": families}
    write_record(record, output, to_markdown(record))


if __name__ == "__main__":
    app()
