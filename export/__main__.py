"""``python -m export``: merge the adapters, write the graphs, quantize, compare with torch, and pack a bundle."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from export.bundle import DEFAULT_LICENCE
from export.command import run
from training.fetch import DEFAULT_CACHE

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def export(
    checkpoint: Annotated[str, typer.Option(help="InstructBLIP folder or hub name: the base of the adapters.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run, or of one finished stage; repeatable in order.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16, int8, int4 (or q4), q4a8, q4f16, nf4, or all; repeated, the first is the default."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "cbedge-model",
    version: Annotated[str, typer.Option(help="Version of the model.")] = "0.1.0",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = DEFAULT_LICENCE,
    origin: Annotated[
        Path | None, typer.Option(help="JSON file with base_weights and training_data.", show_default="from the run")
    ] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON file written by `python -m training evaluate`.")] = None,
    data: Annotated[Path | None, typer.Option(help="IU X-RAY folder, to compare on 50 validation studies.")] = None,
    vocabulary: Annotated[
        str, typer.Option(help="full; or domain, which keeps the tokens of --data's train reports and common ones.")
    ] = "full",
    common: Annotated[
        int, typer.Option(min=0, help="With --vocabulary domain, how many of the language's first merges are kept.")
    ] = 12_000,
    no_repeat: Annotated[
        int, typer.Option(min=0, help="Drafts never repeat an n-gram of this many tokens; 0 allows repeats.")
    ] = 0,
    stop_bias: Annotated[
        float, typer.Option(min=-20, max=20, help="Below 0: longer drafts; above 0: shorter drafts.")
    ] = 0.0,
    block_size: Annotated[
        int, typer.Option(help="Block size of the language model's quantization: 32, 64 or 128.")
    ] = 32,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Quantization of the language model's 4-bit weights: gptq (needs --data), rtn, k_quant or hqq.",
            show_default="gptq with --data, else rtn",
        ),
    ] = None,
    tune: Annotated[
        int, typer.Option(min=0, help="With gptq, steps in which the scales are tuned to fp32 (8 s each on two cores).")
    ] = 0,
    language_from: Annotated[
        Path | None,
        typer.Option(
            help="A bundle that the checkpoint has its language model from, restored and not trained: its graphs are "
            "taken as they are, where rounding again would lose more."
        ),
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Folder for the parity table as JSON and Markdown.")] = None,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
) -> None:
    """Export one bundle."""
    wanted = _variants(variant or ["int4"], told=lambda text: typer.echo(text, err=True))
    if vocabulary not in ("full", "domain"):
        raise ValueError(f"unknown vocabulary {vocabulary!r}; give full or domain")
    if vocabulary == "domain" and data is None:
        raise ValueError("--vocabulary domain takes its words from the train reports: give --data")
    if algorithm == "gptq" and data is None:
        raise ValueError("--algorithm gptq rounds on prompts and reports of train studies: give --data")
    from cbedge.bundles.bundle import check_target, open_bundle

    check_target(out, force)
    language = open_bundle(language_from) if language_from else None
    if language is not None:
        language.verify()
    measured: dict[str, Any] = json.loads(quality.read_text(encoding="utf-8")) if quality else {}
    console = Console(stderr=True)
    from export.bundle import Origin, pack
    from export.gptq import can_be_rounded
    from export.graphs import export_graphs
    from export.merge import merge
    from export.nf4 import write_nf4
    from export.parity import write_parity
    from export.quantize import ALGORITHMS, HALF, NF4, Int4Settings, round_for, write_variant
    from export.tracing import HEAD
    from export.vocabulary import domain_texts, restrict_vocabulary
    from training.trained import load_adapted

    if algorithm not in (None, *ALGORITHMS):
        raise ValueError(f"unknown algorithm {algorithm!r}; give one of: {', '.join(ALGORITHMS)}")
    parts = load_adapted(checkpoint, list(adapters or []), cache)
    if not parts.model.config.use_decoder_only_language_model and "all" in (variant or ()):
        wanted = tuple(one for one in wanted if one not in HALF)  # which do not hold what Flan-T5 computes
    merge_error = merge(parts)
    console.print(f"merged: logits within {merge_error:.1e} of the unmerged model's, as a share of the largest")
    if algorithm is None:
        algorithm = "gptq" if data is not None and can_be_rounded(parts.model.language_model) else "rtn"
    if algorithm == "gptq" and not can_be_rounded(parts.model.language_model):
        raise ValueError("GPTQ is for language models of the LLaMA family: give --algorithm rtn")
    if tune and algorithm != "gptq":
        raise ValueError(f"--tune goes on from gptq, not from {algorithm}: give --data, or no --tune")
    settings = Int4Settings(block_size=block_size, algorithm=algorithm, tune=tune)
    if algorithm == "gptq":
        settings = replace(settings, eight_bits=HEAD, eight_bits_block_size=64)  # 64 divides widths that 128 does not
    if vocabulary == "domain" and data is not None:
        before, after = restrict_vocabulary(parts, domain_texts(data), common)
        console.print(f"vocabulary: {after:,} of {before:,} tokens kept")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.graphs.") as scratch:
        graphs = {"fp32": export_graphs(parts, _folder(scratch, "fp32"))}
        extra: dict[str, list[Path]] = {}
        console.print(f"{len(graphs['fp32'])} fp32 graphs written")
        rounded = None
        to_round = {"int4", "q4a8", "q4f16"} & {*wanted} - {*(language.manifest.variants if language else ())}
        if algorithm == "gptq" and data is not None and to_round:
            rounded = round_for(parts, data, settings, _tell(console))
            console.print(f"{len(rounded)} weights rounded by GPTQ")
        for one in wanted:
            if one == NF4:
                extra[one] = write_nf4(parts, _folder(scratch, one))
                console.print(f"{one} written")
            elif one != "fp32":
                taken = language if language and one in language.manifest.variants else None
                graphs[one] = write_variant(one, graphs["fp32"], _folder(scratch, one), settings, rounded, taken)
                console.print(f"{one} written")
        about = Origin.read(origin) if origin else Origin.of(checkpoint, list(adapters or []))
        parity = pack(
            parts,
            graphs,
            extra,
            wanted,
            out,
            name=name,
            version=version,
            licence=licence,
            origin=about,
            quality=measured,
            decoding={"no_repeat": no_repeat, "stop_bias": stop_bias},
            data=data,
            merge_error=merge_error,
            force=force,
            console=console,
        )
    typer.echo(parity.to_markdown())
    if record:
        write_parity(parity, record)
    typer.echo(f"bundle: {out} ({sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB)")


def _tell(console: Console) -> Callable[[int, int, float], None]:
    def tell(step: int, steps: int, divergence: float) -> None:
        if step % 10 == 0 or step in (1, steps):
            console.print(f"scales tuned, step {step} of {steps}: {divergence:.4f} nats a token from fp32")

    return tell


def _variants(names: list[str], told: Callable[[str], None]) -> tuple[str, ...]:
    from cbedge.backends.int8 import multiplies_exactly
    from cbedge.bundles.bundle import IN_INT8
    from export.quantize import ALIASES, VARIANTS

    wanted = [one for name in names for one in (("int4", *VARIANTS) if name == "all" else (ALIASES.get(name, name),))]
    for one in wanted:
        if one not in VARIANTS:
            raise ValueError(f"unknown variant {one!r}; give one of: {', '.join(VARIANTS)}, or all")
    if IN_INT8 in wanted and not multiplies_exactly():  # nor could it be compared with torch here
        if "all" not in names:
            raise ValueError(
                f"{IN_INT8} needs an x86 processor with AVX2; or add it to a bundle with int4: export.revise --vnni"
            )
        told(f"{IN_INT8} is left out: this is no x86 processor with AVX2; export.revise --vnni adds it")
        wanted = [one for one in wanted if one != IN_INT8]
    return tuple(dict.fromkeys(wanted))


def _folder(scratch: str, name: str) -> Path:
    folder = Path(scratch) / name
    folder.mkdir()
    return folder


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
