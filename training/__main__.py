"""Commands for building models: download base weights, check data, train, and evaluate."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cbedge.files import check_output
from cbedge.provenance import provenance
from training.command_line import run
from training.fetch import DEFAULT_CACHE

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command("fetch-base")
def fetch_base_command(
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
) -> None:
    """Download the weights of the base models: pinned versions, checked hashes, kept in the cache."""
    from training.base import BASES
    from training.fetch import fetch_base

    for part in [part for base in BASES.values() for part in base.weights]:
        typer.echo(f"{part.name}: {fetch_base(part, cache)}")


data_app = typer.Typer(help="Inspect a data set before training.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check_command(
    folder: Annotated[Path, typer.Argument(help="IU X-RAY in any of its layouts, or MIMIC-CXR-JPG.")],
    plot: Annotated[Path | None, typer.Option(help="PNG of report lengths and label counts to write.")] = None,
    index_cache: Annotated[
        Path | None, typer.Option(help="Cache folder for the index of a large data set (it contains report text).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --plot.")] = False,
) -> None:
    """Report which files were found, how they were joined, and which studies were dropped and why."""
    from rich.console import Console

    from training.datasets import INDEX_CACHE
    from training.datasets.check import plot_summary, print_summary, summarize

    if plot:
        check_output(plot, force)
    summary = summarize(folder, index_cache or INDEX_CACHE)
    print_summary(summary, Console())
    if not summary.total:
        raise ValueError("no study can be used for training: the table above says why")
    if plot:
        plot_summary(summary, plot)


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Option(help="The run's YAML, such as training/configs/iu_xray_mini.yaml.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data; overrides the configuration.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; overrides the configuration.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto (fp32 on CPU, bf16 on GPU), fp32 or bf16.")] = None,
    base_precision: Annotated[
        str | None,
        typer.Option(help="Precision of frozen weights: fp32, bf16 or nf4.", show_default="from the configuration"),
    ] = None,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Maximum number of steps per stage, for trials.")] = None,
) -> None:
    """Train the stages of a configuration; the same command resumes an interrupted run."""
    from training.config import load_config
    from training.train import run

    chosen = {"data": data, "output": output, "device": device, "precision": precision}
    folder = run(load_config(config, **chosen, base_precision=base_precision), cache, max_steps)
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        typer.echo(f"trained: {folder}")


@app.command("evaluate")
def evaluate_command(
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json and OUTPUT.md.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of IU X-RAY (studies.jsonl and images/).", show_default="--external alone"),
    ] = None,
    model: Annotated[list[Path] | None, typer.Option(help="Folder of a bundle; repeatable.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Variant of the first --model; repeatable, one row each.", show_default="its default"),
    ] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Folder of a run, evaluated in torch.")] = None,
    image_blind: Annotated[
        Path | None,
        typer.Option(
            help="A run, or one finished stage of --run, trained without images: one more row, or the only one."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    limit: Annotated[int | None, typer.Option(min=2, help="Maximum number of studies, for trials.")] = None,
    drafts: Annotated[Path | None, typer.Option(help="JSON Lines file for all drafts; do not commit it.")] = None,
    from_drafts: Annotated[
        Path | None, typer.Option(help="Score the drafts of such a file, written by the first --model, again.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for --run.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Radiographs per batch of the encoder.")] = 16,
    chexbert: Annotated[Path | None, typer.Option(help="Path of chexbert.pth, for CheXbert scores.")] = None,
    radgraph: Annotated[
        Path | None, typer.Option(help="Folder with the unpacked model radgraph/, for RadGraph F1.")
    ] = None,
    external: Annotated[
        list[str] | None,
        typer.Option(help="nih_cxr14=FOLDER: evaluate the first --model on films of another hospital too; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
) -> None:
    """Score bundles (as users run them) or a run (in torch) on IU X-RAY, with controls.

    The first --model, or else the run, also gets the controls: images swapped, image blank, indication withheld. The
    retrieval controls and linear probes are measured with the run's encoder, or else with the first --model's.
    """
    from training.drafting import Encoder, TorchDrafter
    from training.evaluate import PACKAGES, evaluate, to_markdown
    from training.external import document, evaluate_films, parse_external, read_films
    from training.labelers import Chexbert
    from training.run_bundle import ReportResources
    from training.trained import load_merged

    _check_split(split)
    if from_drafts and not model:
        raise ValueError("--from-drafts needs the bundle that wrote them: give --model")
    if not model and run_folder is None and image_blind is None:
        raise ValueError("nothing to evaluate: give --model BUNDLE, --run RUN or both, or --image-blind RUN")
    _check_results(output, force)
    if (variant or external) and not model:
        raise ValueError(f"--{'variant' if variant else 'external'} needs a bundle: give --model")
    away = {name: read_films(name, folder, split) for name, folder in map(parse_external, external or ())}
    if data is None:
        if not away or not model:
            raise ValueError("nothing to evaluate without --data: give it, or --model BUNDLE and --external")
        measured = _evaluate_external(away, model[0], variant[0] if variant else None)
        _finish(measured, document, output, "; ".join(f"{name}, {split}" for name in away), model[0])
        return
    drafters, seeing = _drafters(model or [], variant or [None], run_folder, data, cache, device)
    encoder = Encoder(seeing[0].generator, batch_size) if seeing else None
    blind = None
    if image_blind is not None:
        parts = load_merged(image_blind, cache, device)
        blind = TorchDrafter(parts, "image-blind model (torch)", True, ReportResources.learn(parts, data))
    labelers: dict[str, Any] = {"chexbert": Chexbert(chexbert, cache=cache) if chexbert else None, "radgraph": radgraph}
    record = evaluate(
        data,
        drafters,
        encoder,
        split,
        limit,
        image_blind=blind,
        drafts_file=drafts,
        recorded=from_drafts,
        **labelers,
    )
    record["external"] = {name: evaluate_films(drafters[0].generator, films) for name, films in away.items()}
    studied = [f"IU X-RAY, {split}", *[f"{name}, {split}" for name in away]]
    _finish(record, to_markdown, output, "; ".join(studied), model[0] if model else None, PACKAGES)


def _evaluate_external(away: Mapping[str, Any], model: Path, variant: str | None) -> dict[str, Any]:
    """A record of films of other hospitals alone."""
    from rich.console import Console
    from rich.progress import Progress

    from cbedge.api import ReportGenerator
    from training.external import evaluate_films

    generator = ReportGenerator.from_pretrained(model, variant, "cpu")
    record: dict[str, Any] = {"variant": generator.variant, "external": {}}
    for name, films in away.items():
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=len(films))
            record["external"][name] = evaluate_films(generator, films, partial(bar.advance, task))
    return record


def _drafters(
    models: list[Path], variants: Sequence[str | None], run_folder: Path | None, data: Path, cache: Path, device: str
) -> tuple[list[Any], list[Any]]:
    """A drafter for each row of the table, and the one whose image side is measured: the run's, or a bundle's."""
    from training.drafting import RuntimeDrafter, TorchDrafter
    from training.run_bundle import ReportResources
    from training.trained import load_merged

    drafters: list[Any] = [RuntimeDrafter(folder, name) for folder in models[:1] for name in variants]
    drafters += [RuntimeDrafter(folder, None) for folder in models[1:]]
    if run_folder is None:
        return drafters, drafters[:1]
    parts = load_merged(run_folder, cache, device)
    seeing = TorchDrafter(parts, resources=ReportResources.learn(parts, data, with_templates=True))
    return [*drafters, seeing], [seeing]


@app.command("ablate")
def ablate_command(
    config: Annotated[Path, typer.Option(help="The whole run's YAML, such as training/configs/iu_xray_mini.yaml.")],
    runs: Annotated[Path, typer.Option(help="Folder for the runs, one per cell; existing runs are resumed.")],
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json and OUTPUT.md.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data; overrides the configuration.")] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    limit: Annotated[int | None, typer.Option(min=2, help="Maximum number of studies, for trials.")] = None,
    cell: Annotated[
        list[str] | None, typer.Option(help="Only this cell, such as both-priors or none-no-priors; repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto (fp32 on CPU, bf16 on GPU), fp32 or bf16.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Maximum number of steps per stage, for trials.")] = None,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
) -> None:
    """Run the paper's ablation: LoRA on no part, vision, language or both, each without and with priors."""
    from training.ablation import CELLS, ablate, to_markdown
    from training.config import load_config

    _check_results(output, force)
    known = {c.name: c for c in CELLS}
    unknown = [name for name in cell or () if name not in known]
    if unknown:
        raise ValueError(f"unknown cell {unknown[0]!r}; known: {', '.join(known)}")
    settings = load_config(config, data=data, output=runs, device=device, precision=precision)
    cells = tuple(known[name] for name in cell or known)
    record = ablate(settings, runs, cache, split=split, limit=limit, cells=cells, max_steps=max_steps)
    _finish(record, to_markdown, output, f"IU X-RAY, {split}")


@app.command("curve")
def curve_command(
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY (studies.jsonl and images/).")],
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json, OUTPUT.md and OUTPUT.png.")],
    base: Annotated[str, typer.Option(help="mini, a checkpoint folder or a hub name.")] = "mini",
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    repeats: Annotated[int, typer.Option(min=1, help="Random samples of each fraction of the train split.")] = 5,
    limit: Annotated[int | None, typer.Option(min=8, help="Maximum number of studies per split, for trials.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Radiographs per batch of the encoder.")] = 16,
    cache: Annotated[Path, typer.Option(help="Cache folder for base weights.")] = DEFAULT_CACHE,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
) -> None:
    """Measure whether more studies would help: linear probes of a frozen image encoder, fitted to parts of the train
    split."""
    from training import learning_curve as curve
    from training.base import load_model
    from training.drafting import Encoder
    from training.parallel import choose_device
    from training.run_bundle import open_run

    _check_split(split)
    _check_results(output, force)
    parts = load_model(base, cache, image_side=True)
    parts.model.to(choose_device(device))
    record = curve.measure(Encoder(open_run(parts), batch_size), data, split, repeats, limit)
    curve.plot(record, output.with_suffix(".png"))
    _finish(record | {"base": base}, curve.to_markdown, output, f"IU X-RAY, train and {split}")


@app.command("browse")
def browse_command(
    drafts: Annotated[Path, typer.Argument(help="JSON Lines file written by `evaluate --drafts`.")],
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY, for the radiographs.")],
    out: Annotated[Path, typer.Option(help="HTML page to write; it holds patient data, so keep it with the data.")],
    row: Annotated[
        str | None, typer.Option(help="Row of the drafts, such as 'int4 (cbedge)'.", show_default="the first")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of studies.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing page.")] = False,
) -> None:
    """Write a page that shows drafts beside references and radiographs, errors first."""
    from training.browser import write_browser

    check_output(out, force)
    typer.echo(f"{write_browser(drafts, data, row, out, limit)} studies: {out}")


@app.command("like-paper")
def like_paper_command(
    drafts: Annotated[Path, typer.Argument(help="JSON Lines file written by `evaluate --drafts`.")],
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY, for the constant report.")],
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json and OUTPUT.md.")],
    wordnet: Annotated[
        Path | None, typer.Option(help="Folder of WordNet 3.0's files.", show_default="nltk's own data")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
) -> None:
    """Score drafts by the protocol closest to the paper's: nltk's METEOR, ROUGE, findings with impression."""
    from training.paper_protocol import evaluate_drafts, to_markdown

    _check_results(output, force)
    record = evaluate_drafts(drafts, data, wordnet, lambda row: typer.echo(f"scoring {row}", err=True))
    _finish(record, to_markdown, output, f"the studies of {drafts.name}", packages=("nltk", "rouge-score"))


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(help="JSON Lines file written by `evaluate --drafts`.")],
    second: Annotated[Path, typer.Argument(help="The same for another model, or the same file with another row.")],
    output: Annotated[Path, typer.Option(help="Output files: OUTPUT.json and OUTPUT.md.")],
    first_row: Annotated[
        str | None, typer.Option(help="Row of the drafts.", show_default="the first file's first")
    ] = None,
    second_row: Annotated[
        str | None, typer.Option(help="Row of the drafts.", show_default="the second file's first")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing results.")] = False,
) -> None:
    """Compare two models study by study, with bootstrap intervals and p-values."""
    from training.comparison import compare_drafts, to_markdown

    _check_results(output, force)
    record = compare_drafts(first, second, (first_row, second_row))
    _finish(record, to_markdown, output, f"the studies of {first.name} and {second.name}")


def _finish(
    record: dict[str, Any],
    to_markdown: Callable[[dict[str, Any]], str],
    output: Path,
    data: str,
    model: Path | None = None,
    packages: Sequence[str] = ("torch", "transformers"),
) -> None:
    """Write a record with its provenance, and print its tables; ``data`` and ``model`` are what was measured."""
    from training.records import write_record

    record = provenance(data, model, packages, bundle=model is not None) | record
    write_record(record, to_markdown(record), output)
    typer.echo(to_markdown(record))


def _check_split(split: str) -> None:
    if split not in ("test", "val"):
        raise ValueError(f"unknown split {split!r}; give test or val")


def _check_results(output: Path, force: bool) -> None:
    for suffix in (".json", ".md"):
        if output.with_suffix(suffix).exists():
            check_output(output.with_suffix(suffix), force)


if __name__ == "__main__":
    run(app)
