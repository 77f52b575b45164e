"""Fit a bundle's readers of findings: calibrated probabilities, operating points, and figures at home and away.

--iu-xray is "home", whose validation films calibrate; --nih, whose films of the split train are read by readers fitted
without them, is "away". No film of a test split is opened. --features keeps the image features, which take most of the
time: an existing file is read. The record holds all figures (AUC, calibration error, reliability).
"""

from pathlib import Path
from typing import Annotated

import typer

from cbedge.api import ReportGenerator
from cbedge.backends.int8 import multiplies_exactly
from cbedge.bundles.bundle import check_target, open_bundle
from cbedge.bundles.manifest import IN_INT8
from cbedge.provenance import provenance
from export.console import Verbose
from export.finding_features import FilmFeatures, compute_features, list_films
from export.finding_fit import STRENGTH, fit_findings
from export.finding_record import plot, to_markdown
from export.revision import Revision
from training.command_line import run
from training.records import write_record

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def findings(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle; the same folder with --force.")],
    iu_xray: Annotated[Path, typer.Option(help="IU X-RAY folder.")],
    nih: Annotated[Path | None, typer.Option(help="Folder of NIH ChestX-ray14 films with films.jsonl.")] = None,
    features: Annotated[Path | None, typer.Option(help="File (.npz) of the features; read if it exists.")] = None,
    record: Annotated[Path | None, typer.Option(help="Files for the figures: RECORD.json, .md and .png.")] = None,
    strength: Annotated[float, typer.Option(min=0, help="L2 penalty of the readers.")] = STRENGTH,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing bundle.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write the bundle with its readers."""
    check_target(out, force)
    source = open_bundle(bundle)
    source.verify()
    if source.manifest.image_findings is None:
        raise ValueError(f"{source.manifest.name} has no finding scores to start from")
    if features is not None and features.is_file():
        films = FilmFeatures.load(features)
    else:
        generator = ReportGenerator.from_pretrained(bundle, source.manifest.default_variant, "cpu")
        runs = IN_INT8 in source.manifest.variants and multiplies_exactly()
        coarse = ReportGenerator.from_pretrained(bundle, IN_INT8, "cpu") if runs else None
        films = compute_features(generator, list_films(iu_xray, nih), _report, coarse)
        if features is not None:
            films.save(features)
    fitted = fit_findings(films, source.manifest.image_findings, strength)
    revision = Revision(source)
    revision.set_findings(fitted.findings, fitted.reader)
    revision.write(out, force)
    if record is not None:
        data = "IU X-RAY, train, extra and val" + "; NIH ChestX-ray14, train" * (nih is not None)
        values = provenance(data, out, ("scikit-learn", "scipy")) | fitted.record
        write_record(values, to_markdown(values), record)
        plot(values, record.with_suffix(".png"))
    typer.echo(f"bundle: {out}: {len(fitted.findings.names)} findings")


def _report(done: int, of: int) -> None:
    if done % 500 == 0 or done == of:
        typer.echo(f"{done} of {of} films", err=True)


if __name__ == "__main__":
    run(app)
