"""``cbedge batch``: draft many reports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbedge.cli.options import (
    AcceptAnyImage,
    Device,
    MaxNewTokens,
    Model,
    NoTemplate,
    OperatingPoint,
    Template,
    Unassessed,
    Variant,
    written_file,
)
from cbedge.cli.terminal import keep_to_template, print_error, read_text_file
from cbedge.errors import OptionError, RadiographError
from cbedge.files import check_distinct, check_output

if TYPE_CHECKING:
    from cbedge.services.batch import Tally
    from cbedge.services.studies import Found, Item


def batch(
    studies: Annotated[str, typer.Argument(help="Folder, glob pattern, file, or .csv table.")],
    out: Annotated[Path, written_file("JSON Lines file to write; an existing one is resumed.", "--out", "-o")],
    model: Model = None,
    variant: Variant = None,
    device: Device = "auto",
    operating_point: OperatingPoint = None,
    max_new_tokens: MaxNewTokens = None,
    template: Template = None,
    no_template: NoTemplate = False,
    documents: Annotated[
        Path | None, typer.Option(help="Folder: also write each draft as a file of its own, in --format.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="For --documents: text, json, sr or fhir.")] = "text",
    pair_views: Annotated[
        bool, typer.Option("--pair-views", help="Draft the frontal and lateral DICOM files of a study together.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry radiographs that failed before.")] = False,
    accept_any_image: AcceptAnyImage = False,
    unassessed: Unassessed = "mark",
    parquet: Annotated[
        Path | None, written_file("Also write a Parquet table to this file; needs the extra batch.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files of --parquet and --documents.")] = False,
) -> None:
    """Draft the reports of many radiographs. Run the same command again to resume after an interruption.

    A table has the column image, and may have id, indication, comparison, view and lateral.
    """
    from dataclasses import replace

    from cbedge.drafting.assessment import check_shown_as
    from cbedge.images.radiograph import printable
    from cbedge.outputs import check_format
    from cbedge.report import MARKED
    from cbedge.services import batch
    from cbedge.services.studies import find_studies, join_views

    if template and no_template:
        raise OptionError("--template and --no-template cannot be combined: give one of them")
    check_format(form)
    check_shown_as(unassessed)
    if form != "text" and documents is None:
        raise OptionError(f"--format {form} is for --documents: give a folder")

    found = find_studies(studies, documents)
    _print_skipped(found)
    items = [replace(item, image=item.image.absolute()) for item in found.items]
    items = join_views(items) if pair_views else items
    inputs = [path for item in items for path in (item.image, item.lateral) if path is not None]
    inputs += [Path(studies), *([template] if template else [])]
    check_output(out, True, inputs, regular=True)
    files = None if documents is None else batch.Documents(documents, form)
    if files is not None:
        files.check(items, inputs, [out, *([parquet] if parquet else [])])
    if parquet is not None:
        check_output(parquet, force, [*inputs, out])
        check_distinct({"--parquet": parquet, "--out": out})
    from cbedge.api import ReportGenerator
    from cbedge.backends import choose_variant
    from cbedge.bundles.bundle import open_bundle
    from cbedge.drafting.codec import TextCodec
    from cbedge.drafting.template_parser import check_template

    bundle = open_bundle(model).at(operating_point)
    name, device = choose_variant(bundle, variant, device)
    wording = None if template is None else check_template(bundle.manifest, read_text_file(template), TextCodec(bundle))
    if pair_views and not bundle.manifest.reads_lateral:
        raise OptionError(f"{bundle.manifest.name} reads one radiograph a study: leave --pair-views out")
    generator = keep_to_template(
        ReportGenerator.from_pretrained(model, variant, device, operating_point=operating_point), template
    )
    decoding = replace(generator.decoding, keep_to_template=not no_template)
    if files is not None:
        files.prepare(out, force)

    def draft(item: Item) -> dict[str, Any]:
        return batch.draft_item(
            item,
            generator,
            files,
            max_new_tokens=max_new_tokens,
            accept_any_image=accept_any_image,
            decoding=decoding,
            unassessed=unassessed,
        )

    drafted_by = f"{bundle.manifest.name} {bundle.manifest.version} {name}"
    if wording is not None:
        drafted_by += f" template {hashlib.sha256(wording.text.encode()).hexdigest()[:8]}"
    drafted_by += " no template" if no_template else ""
    drafted_by += f" operating point {operating_point}" if operating_point else ""
    drafted_by += f" max new tokens {max_new_tokens}" if max_new_tokens is not None else ""
    drafted_by += f" unassessed {unassessed}" if unassessed != MARKED else ""
    drafted_by += f" documents {form}" if documents else ""  # a finished draft without its document is not resumed
    with _progress_bar(len(items)) as advance:
        tally = batch.run_batch(items, out, drafted_by, draft, retry_failed, progress=advance)
    if parquet is not None:
        batch.write_parquet(out, parquet, force, inputs)
    skipped = f", {tally.skipped} already there" if tally.skipped else ""
    print_error(f"wrote {tally.written} {'draft' if tally.written == 1 else 'drafts'} to {out}{skipped}")
    if tally.cut_off:
        print_error(
            f"note: {tally.cut_off} of them {'was' if tally.cut_off == 1 else 'were'} cut off at the token limit; "
            "raise --max-new-tokens and give another --out for longer ones"
        )
    if tally.left:
        print_error(
            f"note: {tally.left} earlier {'draft' if tally.left == 1 else 'drafts'} of radiographs that are no longer "
            f"given were kept in {out}; give another --out to leave them out"
        )
    for name, message in tally.failed:
        print_error(f"failed: {printable(name)}: {message}")
    if tally.failed:
        others = "; the others are drafted" if len(tally.failed) < len(items) else ""
        raise RadiographError(f"{len(tally.failed)} of {len(items)} radiographs failed{others}")
    if found.unreadable:
        raise RadiographError(f"{len(found.unreadable)} folders could not be read; change their permissions")


def _print_skipped(found: Found) -> None:
    """Name the first few files and folders that are not drafted."""
    from cbedge.images.radiograph import printable

    for kind, names in (
        ("files and folders skipped because they are not radiographs", found.skipped),
        ("folders could not be read", found.unreadable),
    ):
        if names:
            more = ", ..." if len(names) > 5 else ""
            print_error(f"{len(names)} {kind}: {', '.join(map(printable, names[:5]))}{more}")


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[Tally], None]]:
    """A progress bar on a terminal, and a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drafting"), BarColumn(), MofNCompleteColumn(), TextColumn("remaining"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda tally: bar.advance(task)
