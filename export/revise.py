"""``python -m export.revise``: other decoding, openings, templates, phrases, words, variants or quality for a bundle.

What a model writes is measured on its bundle, so the figures come after the export; and how it decodes is chosen by
such figures. Neither needs the graphs to be written again: they stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer
import yaml

from cbedge.backends import open_backend
from cbedge.bundles.bundle import (
    CARD,
    FILM_VIEW,
    PHRASEBOOK,
    TEMPLATES,
    WORDS,
    Bundle,
    check_target,
    open_bundle,
    write_bundle,
)
from cbedge.bundles.manifest import IN_INT8, Manifest, Variant
from export.bundle import PARITY, PARITY_CASES
from export.card import model_card
from export.console import Verbose, run
from export.film_view import collect_films, fit_film_view
from export.parity import Parity, VariantParity, compare, parity_cases
from export.phrases import phrasebook_of
from export.quantize import DESCRIPTIONS, SUFFIX, half_on_the_same_weights, in_int8
from export.tracing import DECODER, EMBED
from export.words import lexicon_of
from training.fetch import DEFAULT_CACHE
from training.openings import with_denials
from training.templates import templates_of
from training.trained import load_adapted

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def revise(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle; the same folder with --force.")],
    version: Annotated[str | None, typer.Option(help="Version of the model.", show_default="unchanged")] = None,
    openings: Annotated[
        Path | None, typer.Option(help="YAML file, finding: opening sentence of a draft; an empty file for none.")
    ] = None,
    denials: Annotated[
        bool,
        typer.Option("--denials", help="Update the patterns of contradictions from training/ontology.yaml."),
    ] = False,
    templates: Annotated[
        Path | None, typer.Option(help="IU X-RAY folder: rebuild the templates from its train reports.")
    ] = None,
    phrases: Annotated[
        Path | None,
        typer.Option(
            help="IU X-RAY or MIMIC-CXR-JPG folder: make the phrasebook anew, of its train reports and of what the "
            "bundle, as it is, writes of these studies: two drafts each."
        ),
    ] = None,
    phrase_studies: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of these studies.", show_default="all")
    ] = None,
    film_view: Annotated[
        Path | None,
        typer.Option(
            help="IU X-RAY folder: retrain the classifier of lateral and mirrored images on its train images."
        ),
    ] = None,
    more_films: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with films.jsonl, of frontal films to learn from too; repeatable."),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(help="IU X-RAY or MIMIC-CXR-JPG folder: rebuild the lexicon from its train reports."),
    ] = None,
    no_templates: Annotated[bool, typer.Option("--no-templates", help="Remove the templates.")] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="Only this variant; repeatable, the first becomes the default.")
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Add q4f16, for GPUs, on int4's own weights: a graph of the decoder in 16 bits, and no more."
        ),
    ] = False,
    vnni: Annotated[
        bool,
        typer.Option(
            "--vnni", help="Add q4a8, for x86 processors, on int4's own weights: graphs that multiply 8-bit integers."
        ),
    ] = False,
    parity: Annotated[
        Path | None,
        typer.Option(
            help="The merged checkpoint in fp32, for one as python -m export.restore writes it: compare the bundle's "
            "variants, as they are, with it."
        ),
    ] = None,
    parity_data: Annotated[
        Path | None,
        typer.Option(help="IU X-RAY folder: compare on 50 validation studies.", show_default="the example radiograph"),
    ] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON file written by `python -m training evaluate`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write the revised bundle."""
    check_target(out, force)
    source = open_bundle(bundle)
    source.verify()
    manifest = source.manifest
    for told, needed, option in (
        (more_films, film_view, "--more-films goes with --film-view"),
        (phrase_studies, phrases, "--phrase-studies goes with --phrases"),
        (parity_data, parity, "--parity-data goes with --parity"),
    ):
        if told and not needed:
            raise ValueError(f"{option}: give both")
    if (templates or no_templates) and manifest.image_findings is None:
        raise ValueError(f"{manifest.name} has no image scores that say what a template must not hide")
    new: dict[str, Callable[[Path], object]] = {}  # what writes each new file
    if keep:
        manifest = _with_only(source, manifest, keep)
    if gpu:
        manifest, half = _with_half(source, manifest)
        new[manifest.variants["q4f16"].graphs[DECODER]] = lambda path: onnx.save(half, str(path))
    if vnni:
        manifest = _with_int8(manifest)
    manifest = _told(manifest, version, openings, quality)
    if denials:
        if manifest.image_findings is None:
            raise ValueError(f"{manifest.name} has no image scores: nothing can contradict them")
        manifest = replace(manifest, image_findings=with_denials(manifest.image_findings))
    if parity:
        compared = _compare(source, parity, parity_data)
        manifest = replace(manifest, quality=manifest.quality | {"parity": compared})
        new[PARITY] = lambda path: path.write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
    if phrases:
        new[PHRASEBOOK] = phrasebook_of(bundle, phrases, phrase_studies, _tell).save
    if film_view:
        collections = collect_films(film_view, more_films or ())
        backend = open_backend(source, manifest.variants[manifest.default_variant], "cpu")
        learnt = fit_film_view(backend, manifest.preprocessing, collections)
        if learnt is None:
            raise ValueError(f"{film_view} has too few training films to tell lateral and mirrored ones")
        new[FILM_VIEW] = learnt.save
    made = templates_of(manifest.image_findings, templates) if templates and manifest.image_findings else None
    if made is not None:
        new[TEMPLATES] = made.save
    if words:
        new[WORDS] = lexicon_of(words).save
    measured = manifest.quality.get("parity")
    keeps = TEMPLATES in new or (TEMPLATES in manifest.files and not no_templates)
    card = model_card(manifest, _parity(measured) if measured else None, keeps)
    new[CARD] = lambda path: path.write_text(card, encoding="utf-8")

    def fill(folder: Path) -> Manifest:
        left = {file for v in manifest.variants.values() for file in (*v.graphs.values(), *v.data)}
        gone = {f for v in source.manifest.variants.values() for f in (*v.graphs.values(), *v.data)} - left
        gone |= {*new, *([TEMPLATES] if no_templates else [])}
        for name in manifest.files.keys() - gone:
            shutil.copyfile(source.folder / name, folder / name)
        for name, write in new.items():
            write(folder / name)
        if vnni:
            in_int8({kind: folder / file for kind, file in manifest.variants["int4"].graphs.items()}, folder)
        return manifest

    write_bundle(out, fill, force)
    typer.echo(f"bundle: {out}: {manifest.name} {manifest.version}")


def _told(manifest: Manifest, version: str | None, openings: Path | None, quality: Path | None) -> Manifest:
    """The manifest with what is said of the model, and how it decodes; ``None`` leaves each as it is."""
    if version:
        manifest = replace(manifest, version=version)
    if openings:
        manifest = _open_with(manifest, openings)
    if quality:
        measured = json.loads(quality.read_text(encoding="utf-8"))
        before = {"parity": manifest.quality["parity"]} if "parity" in manifest.quality else {}
        manifest = replace(manifest, quality=measured | before)
    return manifest


def _with_only(source: Bundle, manifest: Manifest, names: list[str]) -> Manifest:
    """The manifest with some variants alone, the first of which is its default."""
    kept = [source.variant(name)[0] for name in names]
    variants = {name: manifest.variants[name] for name in dict.fromkeys(kept)}
    return replace(manifest, variants=variants, default_variant=kept[0])


def _tell(done: int, of: int) -> None:
    if done % 100 == 0 or done == of:
        typer.echo(f"{done} of {of} drafts", err=True)


def _compare(bundle: Bundle, checkpoint: Path, data: Path | None) -> dict[str, Any]:
    """What is to be recorded of a bundle's variants beside the checkpoint; what was of others on the same studies
    stays."""
    cases, where = parity_cases(bundle.manifest.preprocessing, data, PARITY_CASES)
    variants = bundle.manifest.variants
    backends = {name: partial(open_backend, bundle, variant, "cpu") for name, variant in variants.items()}
    sizes = {
        name: sum((bundle.folder / file).stat().st_size for file in {*variant.graphs.values(), *variant.data}) / 1e6
        for name, variant in variants.items()
    }
    known = bundle.manifest.quality.get("parity")
    before = _parity(known) if known else None
    error = before.merge_error if before else 0.0
    found = compare(
        load_adapted(str(checkpoint), [], DEFAULT_CACHE), backends, sizes, cases, where, error, progress=_tell
    )
    if before and (before.cases, before.source) == (found.cases, found.source):
        found = replace(found if "fp32" in variants else before, variants=before.variants | found.variants)
    return asdict(found)


def _with_half(bundle: Bundle, manifest: Manifest) -> tuple[Manifest, onnx.ModelProto]:
    """The manifest with q4f16 beside int4, whose other graphs it shares, and its decoder."""
    shared = _shared(manifest, "--gpu", "q4f16")
    half = half_on_the_same_weights(bundle.folder / shared.graphs[DECODER])
    graphs = {**shared.graphs, DECODER: f"{DECODER}{SUFFIX['q4f16']}.onnx"}
    told = "int4's weights, the decoder in 16 bit arithmetic, for GPUs"
    variants = {**manifest.variants, "q4f16": replace(shared, description=told, graphs=graphs)}
    return replace(manifest, variants=variants), half


def _with_int8(manifest: Manifest) -> Manifest:
    """The manifest with q4a8 beside int4, whose embedding and whose weights it reads."""
    shared = _shared(manifest, "--vnni", IN_INT8)
    kinds = [kind for kind in shared.graphs if kind != EMBED]
    names = {kind: f"{kind}{SUFFIX[IN_INT8]}" for kind in kinds}
    data = (*shared.data, *(shared.graphs[kind] for kind in kinds), *(f"{name}.json" for name in names.values()))
    graphs = {**shared.graphs, **{kind: f"{name}.onnx" for kind, name in names.items()}}
    variant = Variant(DESCRIPTIONS[IN_INT8], graphs, data)
    return replace(manifest, variants={**manifest.variants, IN_INT8: variant})


def _shared(manifest: Manifest, option: str, name: str) -> Variant:
    """int4, on whose weights another variant is to be."""
    if "int4" not in manifest.variants or name in manifest.variants:
        reason = f"has {name} already" if name in manifest.variants else "has no int4, whose weights it would share"
        raise ValueError(f"{option} adds {name}, and {manifest.name} {reason}")
    return manifest.variants["int4"]


def _open_with(manifest: Manifest, path: Path) -> Manifest:
    sentences = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    told = manifest.image_findings
    if told is None:
        raise ValueError(f"{manifest.name} is not told what it sees: no finding can open a draft")
    if not isinstance(sentences, dict) or not all(isinstance(text, str) for text in sentences.values()):
        raise ValueError(f"{path} is no mapping of findings to sentences")
    unknown = [name for name in sentences if name not in told.names]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r}; {manifest.name} looks for: {', '.join(told.names)}")
    lines = tuple(sentences.get(name, "") for name in told.names) if sentences else ()
    return replace(manifest, image_findings=replace(told, openings=lines))


def _parity(values: dict[str, Any]) -> Parity:
    variants = {name: VariantParity(**variant) for name, variant in values["variants"].items()}
    return Parity(**{**values, "variants": variants})


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
