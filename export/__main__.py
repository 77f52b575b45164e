"""Merge the adapters, write the graphs, quantize, compare with torch, and pack a bundle.

The origin of data and weights is what the runs recorded, unless --origin gives it. --language-from copies the graphs of
a language model that was restored from a bundle, because rounding them again would lose more.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cbedge.bundles.bundle import check_target, open_bundle
from cbedge.cli.options import number
from export.bundle import DEFAULT_LICENCE, ModelInfo, Origin
from export.console import Steps, Verbose, programs
from export.parity import Parity, write_parity
from export.pipeline import ExportSettings, export_model
from export.vocabulary import COMMON
from training.command_line import run
from training.fetch import DEFAULT_CACHE

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
GRAPH_LABELS = {
    "vision_encoder": "vision",
    "qformer": "Q-Former",
    "embed_tokens": "embedding",
    "decoder_model_merged": "decoder",
    "qformer, findings": "findings",
}
OTHERS = "\n\n".join(f"python -m export.{name}: {text}" for name, text in programs(Path(__file__).parent).items())

Variants = Annotated[
    list[str] | None,
    typer.Option(help="fp32, fp16, int8, int4 (or q4), q4a8, q4f16, nf4 or all; repeatable, the first is the default."),
]
Algorithm = Annotated[
    str | None,
    typer.Option(help="4-bit weights: gptq (needs --data), rtn, k_quant or hqq.", show_default="gptq or rtn"),
]
LanguageFrom = Annotated[
    Path | None,
    typer.Option(help="Bundle whose language model is in the checkpoint, not trained since: its graphs are copied."),
]


@app.command(help=__doc__, epilog=OTHERS)
def export(
    checkpoint: Annotated[str, typer.Option(help="InstructBLIP folder or hub name: the base of the adapters.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    adapters: Annotated[list[Path] | None, typer.Option(help="Folder of a run or stage; repeatable in order.")] = None,
    variant: Variants = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "cbedge-model",
    version: Annotated[str, typer.Option(help="Version of the model.")] = "0.1.0",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = DEFAULT_LICENCE,
    origin: Annotated[Path | None, typer.Option(help="JSON file with base_weights and training_data.")] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON file written by `python -m training evaluate`.")] = None,
    data: Annotated[Path | None, typer.Option(help="IU X-RAY folder, to compare on 50 validation studies.")] = None,
    vocabulary: Annotated[str, typer.Option(help="full; or domain: training reports' and common tokens.")] = "full",
    common: Annotated[int, typer.Option(min=0, help="With domain: number of common merges to keep.")] = COMMON,
    no_repeat: Annotated[int, typer.Option(min=0, help="Drafts repeat no n-gram of this length; 0 allows all.")] = 0,
    stop_bias: Annotated[float, number(-20, 20, "Below 0: longer drafts; above 0: shorter.")] = 0.0,
    block_size: Annotated[int, typer.Option(help="Block size of the language model: 32, 64 or 128.")] = 32,
    algorithm: Algorithm = None,
    tune: Annotated[int, typer.Option(min=0, help="With gptq, steps that tune scales (8 s each, two cores).")] = 0,
    language_from: LanguageFrom = None,
    record: Annotated[Path | None, typer.Option(help="Folder for the parity table as JSON and Markdown.")] = None,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
    verbose: Verbose = False,
) -> None:
    """Export one bundle."""
    check_target(out, force)
    if vocabulary not in ("full", "domain"):
        raise ValueError(f"unknown vocabulary {vocabulary!r}; give full or domain")
    runs = adapters or []
    info = ModelInfo(
        name,
        version,
        licence,
        Origin.read(origin) if origin else Origin.of(checkpoint, runs),
        json.loads(quality.read_text(encoding="utf-8")) if quality else {},
        {"no_repeat": no_repeat, "stop_bias": stop_bias},
        data,
    )
    language = open_bundle(language_from) if language_from else None
    if language is not None:
        language.verify()
    settings = ExportSettings(
        checkpoint,
        runs,
        out,
        info,
        variants=variant or ["int4"],
        domain_vocabulary=vocabulary == "domain",
        common=common,
        algorithm=algorithm,
        block_size=block_size,
        tune=tune,
        language=language,
        cache=cache,
        force=force,
    )
    parity = export_model(settings, Steps())
    if record:
        write_parity(parity, out, record)
    Console().print(summary(parity, out))


def summary(parity: Parity, out: Path) -> Table:
    """The bundle's folder, and size and parity of each variant."""
    default = open_bundle(out).manifest.default_variant
    kinds = {kind: GRAPH_LABELS.get(kind, kind) for kind in next(iter(parity.variants.values())).relative_errors}
    table = Table(
        *("variant", "MB", "equal tokens", "equal drafts", *kinds.values()),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"{out}, {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB",
        title_justify="left",
        caption_justify="left",
        caption=f"* default. Compared with torch in fp32 on {parity.cases} cases ({parity.source}); the last columns "
        f"are relative errors. In fp32, {parity.fp32_equal} of {parity.fp32_cases} drafts equal torch's.",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, found in parity.variants.items():
        shares = [found.token_agreement, found.drafts_equal, *found.relative_errors.values()]
        label = f"{name} *" if name == default else name
        table.add_row(label, f"{found.megabytes:.1f}", *(f"{share:.1%}" for share in shares))
    return table


if __name__ == "__main__":
    run(app)
