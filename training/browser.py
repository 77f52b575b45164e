"""An HTML page to read drafts beside their references, errors first. It holds patient data: keep it with the data."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

from cbedge.prompt import split_sections
from training.datasets import Study
from training.datasets.iu_xray import clean_reference, read_studies
from training.datasets.studies import SPLITS
from training.findings import Mention, find_mentions
from training.scoring import rouge_matrix

_TEMPLATE = Path(__file__).with_name("browser.html.j2")
_IMAGE_SIDE = 320


def write_browser(drafts: Path, data: Path, row: str | None, out: Path, limit: int | None = None) -> int:
    """Write the page of one row of a drafts file.

    Args:
        drafts: JSON lines that ``evaluate --drafts`` wrote.
        data: the collection, for the radiographs, which the page embeds.
        row: whose drafts, such as ``int4 (cbedge)``; ``None`` is the file's first.
        out: the page.
        limit: only the first so many studies.

    Returns:
        The number of studies on the page.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file is no drafts file, or has no such row.
    """
    from jinja2 import Environment

    rows = _read(drafts, row)[:limit]
    studies = {s.study_id: s for s in read_studies(data, SPLITS)}
    texts = [f"{given['findings']} {given['impression']}".strip() for given, _ in rows]
    written = [" ".join(part for part in split_sections(draft) if part) for _, draft in rows]
    pages = [
        _study(studies.get(given["study_id"]), given, reference, draft, seen, named)
        for (given, _), reference, draft, seen, named in zip(
            rows, texts, written, find_mentions(texts), find_mentions(written), strict=True
        )
    ]
    # Escaping is on: reports and indications are data, not markup.
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    title = f"{len(pages)} drafts: {row or next(iter(rows[0][0]['drafts']), '')}" if rows else "no drafts"
    out.write_text(template.render(title=title, studies=pages), encoding="utf-8")
    return len(pages)


def _read(path: Path, row: str | None) -> list[tuple[dict[str, Any], str]]:
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            given = json.loads(line)
            name = row or next(iter(given["drafts"]))
            _ = given["study_id"], given["findings"], given["impression"], given["tags"]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ValueError(f"{path}, line {number}, is not what evaluate --drafts wrote ({error})") from None
        if name not in given["drafts"]:
            raise ValueError(f"{path} has no drafts of {name!r}; it has: {', '.join(given['drafts'])}")
        rows.append((given, given["drafts"][name]))
    return rows


def _study(
    study: Study | None, given: dict[str, Any], reference: str, draft: str, seen: list[Mention], named: list[Mention]
) -> dict[str, Any]:
    true = {m.finding for m in seen if not m.denied}
    told = {m.finding for m in named if not m.denied}
    both = len(true & told)
    rouge = rouge_matrix([clean_reference(draft)], [clean_reference(reference)])[0][0]
    return {
        "study_id": given["study_id"],
        "indication": given.get("indication"),
        "tags": [tag for tag in given["tags"] if tag != "abnormal"],
        "abnormal": "abnormal" in given["tags"],
        "image": _embedded(study.image) if study else None,
        "f1": 2 * both / (len(true) + len(told)) if true or told else 1.0,
        "rouge": rouge,
        "missed": sorted(true - told),
        "invented": sorted(told - true),
        "reference": _marked(reference, seen, told, "missed"),
        "draft": _marked(draft, named, true, "invented"),
    }


def _marked(text: str, mentions: list[Mention], other: set[str], alone: str) -> list[tuple[str, str]]:
    """The text in pieces, each with the class of its mention or none."""
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
