"""``python -m tests.golden.drafts``: write ``drafts.json`` anew with the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from cbedge import Report, ReportGenerator

FOLDER = Path(__file__).parent
FILMS = sorted((FOLDER / "films").glob("*.jpg"))
VARIANTS = ("q4a8", "int4")
TEMPLATE = (
    "FINDINGS: The lungs are well expanded and clear. No pleural effusion or pneumothorax. Heart size is within normal "
    "limits. No acute bony abnormality. IMPRESSION: No acute cardiopulmonary process."
)
WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "indication": {"indication": "cough"},
    "template": {"template": TEMPLATE},
}
WITH_LATERAL = 4  # films that are drafted with the next one beside them, given as lateral


def drafts(generator: ReportGenerator) -> Iterator[tuple[str, Report]]:
    """Each draft under its name, ``FILM WAY``."""
    for film in FILMS:
        for way, options in WAYS.items():
            yield f"{film.stem} {way}", generator.generate(film, **options)
    for film, beside in pairwise(FILMS[: WITH_LATERAL + 1]):
        yield f"{film.stem} lateral", generator.generate(film, lateral=beside)


def described(report: Report) -> dict[str, Any]:
    """What is compared of a draft, but for the scores."""
    return {
        "findings": report.findings,
        "impression": report.impression,
        "image_findings": list(report.image_findings or ()),
        "template_source": report.template_source,
        "warnings": list(report.warnings),
        "sentences": [[sentence.section, sentence.text, sentence.finding] for sentence in report.sentences],
    }


def main() -> None:
    """Write the file."""
    record: dict[str, Any] = {}
    for variant in VARIANTS:
        generator = ReportGenerator.from_pretrained(variant=variant, device="cpu")
        for name, report in drafts(generator):
            scores = {finding: round(score, 3) for finding, score in report.finding_scores.items()}
            record[f"{variant} {name}"] = described(report) | {"scores": scores}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (FOLDER / "drafts.json").write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
