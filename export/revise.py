"""Change a bundle: its opening sentences, templates, phrasebook, word list, variants, parity or quality.

The graphs stay as they are. The quality of a model is measured on its bundle and is therefore added after the export.

Data folders are IU X-RAY or MIMIC-CXR-JPG. An empty file for --openings removes the openings. --phrases drafts each
study twice. --gate fits what refuses other images than chest radiographs. --parity takes a checkpoint such as
export.restore writes; without --parity-data it compares on the example radiograph.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cbedge.bundles.bundle import check_target, open_bundle
from export.console import Verbose
from export.revision import Revision
from training.command_line import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def revise(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle; the same folder with --force.")],
    version: Annotated[str | None, typer.Option(help="Version of the model.", show_default="unchanged")] = None,
    openings: Annotated[Path | None, typer.Option(help="YAML file, finding: opening sentence.")] = None,
    denials: Annotated[
        bool, typer.Option("--denials", help="Take contradictions from training/ontology.yaml.")
    ] = False,
    templates: Annotated[Path | None, typer.Option(help="IU X-RAY folder: templates from train reports.")] = None,
    no_templates: Annotated[bool, typer.Option("--no-templates", help="Remove the templates.")] = False,
    phrases: Annotated[Path | None, typer.Option(help="Data folder: phrasebook from reports and own drafts.")] = None,
    phrase_studies: Annotated[int | None, typer.Option(min=1, help="Maximum number of studies for --phrases.")] = None,
    gate: Annotated[Path | None, typer.Option(help="IU X-RAY folder: fit the gate and the familiarity.")] = None,
    more_films: Annotated[list[Path] | None, typer.Option(help="More folders of films; repeatable.")] = None,
    other_images: Annotated[Path | None, typer.Option(help="Folder of images that the gate must refuse.")] = None,
    gate_cache: Annotated[Path | None, typer.Option(help="Folder for image features, for the next time.")] = None,
    words: Annotated[Path | None, typer.Option(help="Data folder: word list from train reports.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Keep only these variants, the first as default.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Add q4f16 for GPUs, on int4's weights.")] = False,
    vnni: Annotated[bool, typer.Option("--vnni", help="Add q4a8 for x86 processors, on int4's weights.")] = False,
    parity: Annotated[Path | None, typer.Option(help="Merged fp32 checkpoint to compare the variants with.")] = None,
    parity_data: Annotated[Path | None, typer.Option(help="IU X-RAY folder: compare on 50 validation studies.")] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON file written by `python -m training evaluate`.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write the revised bundle."""
    check_target(out, force)
    for value, needed, options in (
        (more_films, gate, "--more-films goes with --gate"),
        (other_images, gate, "--other-images goes with --gate"),
        (gate_cache, gate, "--gate-cache goes with --gate"),
        (phrase_studies, phrases, "--phrase-studies goes with --phrases"),
        (parity_data, parity, "--parity-data goes with --parity"),
    ):
        if value and not needed:
            raise ValueError(f"{options}: give both")
    source = open_bundle(bundle)
    source.verify()
    revision = Revision(source)
    changes: list[tuple[object, Callable[..., None]]] = [
        (keep, revision.keep),
        (gpu, revision.add_q4f16),
        (vnni, revision.add_q4a8),
        (version, revision.set_version),
        (openings, revision.set_openings),
        (quality, revision.set_quality),
        (denials, revision.update_denials),
        (parity, partial(revision.compare, data=parity_data, progress=_report)),
        (phrases, partial(revision.set_phrases, limit=phrase_studies, progress=_report)),
        (gate, partial(revision.set_gate, more=more_films or [], others=other_images, cache=gate_cache)),
        (no_templates, revision.remove_templates),
        (templates, revision.set_templates),
        (words, revision.set_words),
    ]
    for given, change in changes:
        if given:
            change(*(() if given is True else (given,)))
    revision.write(out, force)
    typer.echo(f"bundle: {out}: {revision.manifest.name} {revision.manifest.version}")


def _report(done: int, of: int) -> None:
    if done % 100 == 0 or done == of:
        typer.echo(f"{done} of {of} drafts", err=True)


if __name__ == "__main__":
    run(app)
