"""Compare 4-bit weights of one language model.

Every setting quantizes the same fp32 decoder; the other graphs stay in fp32. The record has the size, the share of
positions at which the quantized decoder chooses the token of fp32 after the same tokens, the mean Kullback-Leibler
divergence there, and CIDEr of drafts (findings, cleaned as in R2Gen). The record of a model has a confidence interval
that shows the noise of CIDEr.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.special import log_softmax

from benchmarks.common import write_record
from benchmarks.peer_runners import read_image
from cbedge import ReportGenerator
from cbedge.backends.ort import OnnxBackend
from cbedge.bundles.bundle import Bundle
from cbedge.decoding import decode
from cbedge.provenance import provenance
from export.blockwise import Int4Settings, quantize_language_model
from export.console import quiet_libraries
from export.quantize import round_for
from export.restore import restore
from export.tracing import DECODER, HEAD, save_graph
from training.datasets.iu_xray import clean_reference, read_studies

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
_NOTHING = r"(?!)"
_HEAD = Int4Settings(eight_bits=HEAD, eight_bits_block_size=64)
SETTINGS = {
    "8 bits, block 128": Int4Settings(eight_bits="."),
    "rtn, block 32": Int4Settings(eight_bits=_NOTHING),
    "rtn, zero points, block 32": Int4Settings(eight_bits=_NOTHING, symmetric=False),
    **{f"rtn, block {size}; head in 8 bits": replace(_HEAD, block_size=size) for size in (32, 64, 128)},
    **{
        f"{name}, block {size}; head in 8 bits": replace(_HEAD, block_size=size, algorithm=kind)
        for name, kind, sizes in (
            ("k-quant", "k_quant", (32,)),
            ("HQQ", "hqq", (32, 64, 128)),
            ("GPTQ", "gptq", (32, 64)),
        )
        for size in sizes
    },
    "GPTQ, block 32; head in 8 bits; scales tuned": replace(_HEAD, algorithm="gptq", tune=60),
    "GPTQ, block 32; head, down projection, layers 0 and 1 in 8 bits": Int4Settings(
        algorithm="gptq", eight_bits=rf"{HEAD}|down_proj|layers\.[01]/"
    ),
    "rtn, block 64; attention, down and gate projection, layers 0 and 1 in 8 bits": Int4Settings(block_size=64),
    "k-quant, block 32; attention, down projection, layers 0 and 1 in 8 bits": Int4Settings(
        algorithm="k_quant", eight_bits=r"attn|down_proj|layers\.[01]/"
    ),
    "HQQ, block 32; down projection, layers 0 and 1 in 8 bits": Int4Settings(
        algorithm="hqq", eight_bits=r"down_proj|layers\.[01]/"
    ),
}


@dataclass(frozen=True)
class Case:
    """Embeddings of a prompt, the tokens that fp32 writes, and its logits at each: float32 [T, V]."""

    embeds: np.ndarray
    tokens: list[int]
    expected: np.ndarray


@app.command(help=__doc__)
def main(
    bundle: Annotated[Path, typer.Option(help="A bundle with fp32.")],
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY.")],
    output: Annotated[Path, typer.Option(help="Record as OUTPUT.json and OUTPUT.md.")],
    limit: Annotated[int, typer.Option(min=1, help="Validation studies whose tokens are compared.")] = 30,
    drafts: Annotated[int, typer.Option(min=0, help="Validation studies that are drafted, for CIDEr.")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="Only these settings; repeatable.")] = None,
) -> None:
    """Measure, print and record."""
    quiet_libraries()
    generator = ReportGenerator.from_pretrained(bundle, "fp32", "cpu")
    studies = read_studies(data, ("val",))
    cases = [_case(generator, study) for study in studies[:limit]]
    parts = restore(generator.bundle, "fp32")
    written = [s for s in studies if s.findings][:drafts]
    rows: dict[str, dict[str, Any]] = {}
    source = bundle / generator.bundle.manifest.variants["fp32"].graphs[DECODER]
    if written:
        rows["fp32"] = {
            "megabytes": _megabytes(source),
            "token_agreement": 1.0,
            "kl": 0.0,
            "drafts_equal": 1.0,
            "cider": _cider(generator, written),
        }
        typer.echo(f"fp32: {rows['fp32']}", err=True)
    for name in only or SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / source.name
            rounded = round_for(parts, data, SETTINGS[name]) if SETTINGS[name].algorithm == "gptq" else None
            save_graph(quantize_language_model(source, SETTINGS[name], rounded), path)
            drafter = _with_decoder(generator, path)
            rows[name] = {"megabytes": _megabytes(path), **_compare(drafter, cases)}
            if written:
                rows[name]["cider"] = _cider(drafter, written)
        typer.echo(f"{name}: {rows[name]}", err=True)
        record = {
            **provenance("IU X-RAY, val", bundle),
            "studies": len(cases),
            "drafts": len(written),
            "tokens": sum(len(c.tokens) for c in cases),
            "settings": rows,
        }
        write_record(record, output, to_markdown(record))  # each time, so that a stopped run leaves a record


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    lines = [
        f"# Quantized language model: {record['studies']} validation studies, {record['tokens']} tokens",
        "",
        f"{record['machine']['date']}. Command: `{record['command']}`",
        "",
        f"| weights | MB | equal tokens | KL divergence | all equal | CIDEr of {record['drafts']} drafts |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *[
            f"| {name} | {r['megabytes']:.1f} | {r['token_agreement']:.1%} | {r['kl']:.4f} | {r['drafts_equal']:.0%} | "
            + (f"{r['cider']:.3f} |" if "cider" in r else "- |")
            for name, r in record["settings"].items()
        ],
    ]
    return "\n".join(lines) + "\n"


def _megabytes(graph: Path) -> float:
    return sum(f.stat().st_size for f in (graph, graph.with_suffix(".onnx_data")) if f.is_file()) / 1e6


def _cider(generator: ReportGenerator, studies: list[Any]) -> float:
    """CIDEr of the drafts of studies with findings."""
    from training.scoring import cider

    drafts = [generator.generate(s.image, accept_any_image=True, **vars(s.context)).findings for s in studies]
    return cider([clean_reference(d) for d in drafts], [clean_reference(s.findings) for s in studies])


def _case(generator: ReportGenerator, study: Any) -> Case:
    reading, ids = read_image(generator, study.image, study.context)
    embeds = np.concatenate([reading.image_embeds, generator.backend.embed_tokens(ids)], axis=1)
    decoder = generator.backend.new_decoder(embeds.shape[1] + 160)
    tokens = [t.id for t in decode(decoder, decoder.prefill(embeds), generator.bundle.manifest.stop_ids, 160)]
    return Case(embeds, tokens, _logits(generator, embeds, tokens))


def _logits(generator: ReportGenerator, embeds: np.ndarray, tokens: list[int]) -> np.ndarray:
    decoder = generator.backend.new_decoder(embeds.shape[1] + len(tokens))
    first = decoder.prefill(embeds)
    return np.vstack([first, decoder.append(tokens[:-1])]) if len(tokens) > 1 else first[None]


def _with_decoder(generator: ReportGenerator, path: Path) -> ReportGenerator:
    """The same generator with another decoder."""
    manifest = generator.bundle.manifest
    folder = generator.bundle.folder
    variant = manifest.variants["fp32"]
    graphs = {k: str(folder.absolute() / v) for k, v in variant.graphs.items()} | {DECODER: str(path)}
    backend = OnnxBackend(Bundle(Path("/"), manifest), replace(variant, graphs=graphs), "cpu")
    return ReportGenerator(generator.bundle, "fp32", backend)


def _compare(generator: ReportGenerator, cases: list[Case]) -> dict[str, float]:
    agreed, divergence, equal = 0, 0.0, 0
    for case in cases:
        found = _logits(generator, case.embeds, case.tokens)
        same = found.argmax(1) == np.array(case.tokens)
        agreed += int(same.sum())
        equal += bool(same.all())
        p, q = (log_softmax(logits.astype(np.float64), axis=1) for logits in (case.expected, found))
        divergence += float((np.exp(p) * (p - q)).sum())
    count = sum(len(case.tokens) for case in cases)
    return {"token_agreement": agreed / count, "kl": divergence / count, "drafts_equal": equal / len(cases)}


if __name__ == "__main__":
    app()
