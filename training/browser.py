"""An HTML page that shows drafts beside their references, errors first. It contains patient data."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from cbedge.prompt import split_sections
from training.datasets import Study
from training.datasets.iu_xray import clean_reference, read_studies
from training.datasets.studies import SPLITS
from training.findings import Mention, find_mentions
from training.records import drafts_of, read_drafts
from training.scoring import rouge_matrix

_TEMPLATE = Path(__file__).with_name("browser.html.j2")
_IMAGE_SIDE = 320


def write_browser(drafts: Path, data: Path, row: str | None, out: Path, limit: int | None = None) -> int:
    """Write the page of one row of a drafts file.

    Args:
        drafts: JSON Lines file of ``evaluate --drafts``.
        data: folder of the collection, for the radiographs, which the page embeds.
        row: name of the row, such as ``int4 (cbedge)``; ``None`` for the first.

    Returns:
        The number of studies on the page.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is not a drafts file, or has no such row.
    """
    from jinja2 import Environment

    rows = read_drafts(drafts)[:limit]
    name, chosen = drafts_of(drafts, rows, row)
    studies = {s.study_id: s for s in read_studies(data, SPLITS)}
    texts = [f"{given['findings']} {given['impression']}".strip() for given in rows]
    written = [" ".join(part for part in split_sections(draft) if part) for draft in chosen]
    pages = [
        _study(studies.get(given["study_id"]), given, reference, draft, seen, named)
        for given, reference, draft, seen, named in zip(
            rows, texts, written, find_mentions(texts), find_mentions(written), strict=True
        )
    ]
    # Reports and indications are escaped.
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    title = f"{len(pages)} drafts: {name}"
    out.write_text(template.render(title=title, studies=pages), encoding="utf-8")
    return len(pages)


def _study(
    study: Study | None, given: dict[str, Any], reference: str, draft: str, seen: list[Mention], named: list[Mention]
) -> dict[str, Any]:
    true = {m.finding for m in seen if not m.denied}
    drafted = {m.finding for m in named if not m.denied}
    both = len(true & drafted)
    rouge = rouge_matrix([clean_reference(draft)], [clean_reference(reference)])[0][0]
    return {
        "study_id": given["study_id"],
        "indication": given.get("indication"),
        "tags": [tag for tag in given["tags"] if tag != "abnormal"],
        "abnormal": "abnormal" in given["tags"],
        "image": _embedded(study.image) if study else None,
        "f1": 2 * both / (len(true) + len(drafted)) if true or drafted else 1.0,
        "rouge": rouge,
        "missed": sorted(true - drafted),
        "invented": sorted(drafted - true),
        "reference": _marked(reference, seen, drafted, "missed"),
        "draft": _marked(draft, named, true, "invented"),
    }


def _marked(text: str, mentions: list[Mention], other: set[str], alone: str) -> list[tuple[str, str]]:
    """The text in pieces, each with the CSS class of its mention, or an empty string."""
    pieces, at = [], 0
    for m in mentions:
        kind = "denied" if m.denied else "matched" if m.finding in other else alone
        pieces += [(text[at : m.start], ""), (text[m.start : m.end], kind)]
        at = m.end
    return [*pieces, (text[at:], "")]


def _embedded(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("L")
        small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
