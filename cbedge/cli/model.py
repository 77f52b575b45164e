"""``cbedge model``: describe and verify a model."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbedge.cli.options import Model
from cbedge.errors import DeviceError

if TYPE_CHECKING:
    from rich.table import Table

    from cbedge.findings.image_findings import ImageFindings, Measured

_CLINICAL = {"balanced_accuracy": "balanced accuracy", "finding_f1": "F1, micro", "finding_macro_f1": "F1, macro"}
_TEXT = ("METEOR", "ROUGE-L", "CIDEr")
_CONTROLS = {
    "template alone": "the normal report chosen by the indication; no image",
    "constant": "the same report for every study",
    "nearest image": "the report of the training study whose radiograph is most similar",
    "consensus of 25": "the report that agrees most with the others, of the 25 most similar training radiographs",
}


def model(
    model: Model = None,
    card: Annotated[bool, typer.Option("--card", help="Print the whole model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Describe a model, and verify all its files."""
    from cbedge.backends import choose_variant
    from cbedge.bundles.bundle import CARD, open_bundle
    from cbedge.bundles.manifest import MANIFEST
    from cbedge.errors import OptionError

    if card and as_json:
        raise OptionError("--card and --json exclude each other: give one")
    bundle = open_bundle(model)
    if card or as_json:
        bundle.verify((CARD,))
        typer.echo((bundle.folder / (CARD if card else MANIFEST)).read_text(encoding="utf-8"), nl=False)
        return
    bundle.verify()
    manifest = bundle.manifest
    typer.echo(f"{manifest.name} {manifest.version} ({manifest.license})")
    try:
        here = choose_variant(bundle)[0]
    except DeviceError:  # no ONNX Runtime
        here = manifest.default_variant
    for name, variant in manifest.variants.items():
        size = sum(manifest.files[file].size for file in bundle.variant_files(variant))
        default = ", default on this machine" if name == here else ""
        typer.echo(f"  {name}: {variant.description}, {size / 1e6:.1f} MB{default}")
    for base in manifest.base_weights:
        typer.echo(f"  based on {base['origin']} ({base['licence']})")
    for data in manifest.training_data:
        typer.echo(f"  trained on {data['name']} ({data['licence']})")
    if manifest.image_findings and manifest.image_findings.standings:
        _print_findings(manifest.image_findings)
    if manifest.quality.get("scores"):
        _print_quality(manifest.quality)
    typer.echo(f"{len(manifest.files)} files verified (SHA-256) in {bundle.folder}")
    typer.echo("Model card: cbedge model --card")


def _print_findings(findings: ImageFindings) -> None:
    """Print each finding with its thresholds, its AUC at home and away, and whether it is assessed."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    named = " / ".join(findings.operating_points) or "threshold"
    table = Table("finding", named, "AUC at home", "AUC away", "assessed", title="Image findings", box=HORIZONTALS)
    table.title_justify = "left"
    for column in table.columns[1:-1]:
        column.justify = "right"
    points = [*findings.operating_points.values()] or [findings.thresholds]
    for name, standing, *thresholds in zip(findings.names, findings.standings, *points, strict=True):
        shown = " / ".join(f"{value:.2f}" for value in thresholds)
        table.add_row(name, shown, _interval(standing.home), _interval(standing.away), standing.assessed)
    _print_table(table)
    typer.echo("  AUC with its 95% interval; at home: a hospital whose films trained the model.")
    if findings.operating_point:
        typer.echo(f"  The operating point is {findings.operating_point}; --operating-point chooses another.")


def _interval(measured: Measured | None) -> str:
    return f"{measured.auc:.2f} ({measured.low:.2f}-{measured.high:.2f})" if measured else "-"


def _print_table(table: Table) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=100).print(table)
    typer.echo("\n" + out.getvalue().rstrip())


def _print_quality(quality: dict[str, Any]) -> None:
    """Print the measured quality: the model's drafts first, then the controls."""
    from rich.box import HORIZONTALS
    from rich.table import Table

    scores, clinical = quality["scores"], quality.get("clinical", {}).get("scores", {})
    clinical_names = _CLINICAL if clinical else {}
    title = f"Quality on the {quality.get('split', '?')} split, {quality.get('studies', '?')} studies"
    table = Table("", *clinical_names.values(), *_TEXT, title=title, title_justify="left", box=HORIZONTALS)
    for column in table.columns[1:]:
        column.justify = "right"
    drafts = [name for name in scores if name.endswith("(cbedge)")]
    controls = [name for name in scores if name not in drafts]
    for name in [*drafts, None, *controls]:
        if name is None:
            table.add_section()
            table.add_row("controls", style="italic")
            continue
        found = clinical.get(name, {})
        values = [found[key][0] if key in found else None for key in clinical_names]
        values += [scores[name].get(key) for key in _TEXT]
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    _print_table(table)
    for name, meaning in _CONTROLS.items():
        if name in controls:
            typer.echo(f"  {name}: {meaning}")
    if clinical:
        typer.echo("  Read balanced accuracy and F1 first: METEOR, ROUGE-L and CIDEr mostly reflect the indication.")
    else:
        typer.echo("  Balanced accuracy and F1 are not in this bundle: python -m training evaluate measures them.")
    typer.echo()
