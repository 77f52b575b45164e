"""Draft real films with twelve templates of different style, and count what becomes of the templates' sentences.

Every film is drafted with every template of ``benchmarks/template_styles`` and every CPU variant. The sentences that a
draft should contain are written by hand in ``sentences.json`` beside the templates, so the parser is tested too. The
record has the number of broken drafts, and the share of sentences that are word for word in their section. A sentence
counts as left out with a reason only if a warning names it and the reason can be true: a reported finding contradicts
it, or it belongs to an impression that was left out as a whole and some finding was reported. Because such an
impression also has sentences that nothing contradicts, the share is also given with these counted as missing.
``sentences.json`` also says which finding a sentence plainly denies; the record counts such sentences in drafts that
report the finding.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import write_record
from cbedge import CbedgeError, ContextError, Report, ReportGenerator
from cbedge.backends.int8 import multiplies_exactly
from cbedge.bundles.manifest import IN_INT8
from cbedge.drafting.lexicon import Lexicon
from cbedge.prompt import ClinicalContext
from cbedge.provenance import provenance
from cbedge.report import MARK
from cbedge.sentences import normalize, split_text
from training.datasets.iu_xray import read_studies

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
STYLES = Path(__file__).parent / "template_styles"
RESULTS = Path(__file__).parent / "results" / "templates"
FAULTS = ("no draft", "unknown word", "repeated sentence", "headings", "not complete", "left out without a warning")
_SECTION = {"findings": "FINDINGS:", "impression": "IMPRESSION:"}


@dataclass(frozen=True)
class Style:
    """A template, and its sentences as written by hand.

    Attributes:
        findings, impression: the sentences of each section, with their full stops.
        denies: sentence → the finding that it plainly denies; "abnormal" means any finding except a device.
    """

    name: str
    text: str
    findings: tuple[str, ...]
    impression: tuple[str, ...]
    denies: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What became of a template in one draft.

    Attributes:
        faults: names of :data:`FAULTS`, each with the text that shows it.
        wanted: number of sentences that nothing contradicts.
        found: number of these that are word for word in their section.
        reasons: warnings about sentences that were left out.
        unmatched: sentences of an impression that was left out as a whole, which no reported finding contradicts.
        kept_denials: sentences in the draft that plainly deny a reported finding.
    """

    faults: tuple[tuple[str, str], ...]
    wanted: int
    found: int
    reasons: tuple[str, ...] = ()
    unmatched: int = 0
    kept_denials: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether the draft's text is broken; a missing sentence alone does not break it."""
        return any(name != "left out without a warning" for name, _ in self.faults)


@dataclass
class Row:
    """Sums over all films for one template and variant."""

    template: str
    variant: str
    drafts: int = 0
    broken: int = 0
    wanted: int = 0
    found: int = 0
    contradicted: int = 0
    unmatched: int = 0
    seconds: float = 0.0
    refused: str | None = None
    faults: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    kept_denials: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the uncontradicted sentences that were found word for word, 0 to 1."""
        return self.found / self.wanted if self.wanted else 1.0

    def add(self, style: Style, compared: Comparison, film: str, seconds: float = 0.0) -> None:
        """Count one draft."""
        self.drafts += 1
        self.broken += compared.broken
        self.wanted += compared.wanted
        self.found += compared.found
        self.contradicted += len(style.findings) + len(style.impression) - compared.wanted
        self.seconds += seconds
        self.faults.update({name for name, _ in compared.faults})
        self.reasons.update(compared.reasons)
        self.unmatched += compared.unmatched
        self.kept_denials.update(compared.kept_denials)
        self.examples += [f"{film}: {name}: {what}" for name, what in compared.faults]


def read_styles() -> list[Style]:
    """All templates, sorted by name."""
    known = json.loads((STYLES / "sentences.json").read_text(encoding="utf-8"))
    return [
        Style(
            path.stem,
            path.read_text(encoding="utf-8"),
            tuple(known[path.stem]["findings"]),
            tuple(known[path.stem]["impression"]),
            known[path.stem]["denies"],
        )
        for path in sorted(STYLES.glob("*.txt"))
    ]


def cpu_variants() -> list[str]:
    """The embedded model's CPU variants that this processor can run."""
    return ["int4", *([IN_INT8] if multiplies_exactly() else [])]


def compare(style: Style, report: Report, generator: ReportGenerator, context: ClinicalContext) -> Comparison:
    """Compare a draft with the template that it should follow."""
    findings = generator.bundle.manifest.image_findings
    seen = report.image_findings or ()
    openings = [*findings.open(seen).values()] if findings else []
    texts = [style.text, *openings, *filter(None, (context.indication, context.comparison))]
    faults = broken_by(report, generator.resources.lexicon, texts)
    denied = findings.contradicting(seen) if findings else None
    wanted = found = unmatched = 0
    kept_denials = []
    for section, sentences in (("findings", style.findings), ("impression", style.impression)):
        for sentence in sentences:
            there = stands_in(sentence, getattr(report, section) or "")
            if there and _denies(style.denies.get(sentence), seen):
                kept_denials.append(sentence)
            contradicted = bool(denied and denied.search(sentence))
            explained = not there and _is_explained(sentence, report.warnings)
            if explained and (contradicted or (seen and section == "impression")):
                unmatched += not contradicted
                continue
            wanted += 1
            found += there
            if not there and not explained:
                faults.append(("left out without a warning", f"{section}: {sentence}"))
    left_out = tuple(_without_names(w) for w in report.warnings if "left out" in w)
    return Comparison(tuple(faults), wanted, found, left_out, unmatched, tuple(kept_denials))


def broken_by(report: Report, lexicon: Lexicon | None, texts: Iterable[str]) -> list[tuple[str, str]]:
    """Faults of a draft's text: names of :data:`FAULTS`, each with the text that shows it.

    Args:
        lexicon: words of the training reports.
        texts: other texts whose words the draft may contain.
    """
    faults = []
    known = lexicon.extended(texts) if lexicon else None
    words = re.findall(r"[^\W\d_]+", re.sub("FINDINGS:|IMPRESSION:", " ", report.text))
    if known and (strange := sorted({word for word in words if not known.knows(word)})):
        faults.append(("unknown word", ", ".join(strange)))
    for section in _SECTION:
        said = Counter(map(normalize, split_text(getattr(report, section) or "")))
        faults += [("repeated sentence", f"{section}: {text}") for text, count in said.items() if count > 1]
    places = [report.text.find(heading) for heading in _SECTION.values()]
    once = all(report.text.count(heading) == 1 for heading in _SECTION.values()) and places == sorted(places)
    if not once or places[0] != 0 or not report.findings or not report.impression:
        faults.append(("headings", report.text[:300]))
    if not report.complete:
        faults.append(("not complete", report.text[-100:]))
    return faults


def without_marks(report: Report) -> Report:
    """A draft without the marks of sentences that are not assessed, as its template has none."""
    texts = {name: getattr(report, name).replace(MARK, "") for name in ("text", "findings", "impression")}
    return replace(report, **texts)


def stands_in(sentence: str, section: str) -> bool:
    """Whether a text contains a sentence word for word, between spaces."""
    return f" {sentence} " in f" {section} "


def draft(
    generator: ReportGenerator,
    image: Any,
    styles: Sequence[Style],
    context: ClinicalContext,
    film: str,
    rows: dict[tuple[str, str], Row],
) -> None:
    """Draft one film with every template, and count the results in the rows of the generator's variant."""
    for style in styles:
        row = rows.setdefault((style.name, generator.variant), Row(style.name, generator.variant))
        start = time.perf_counter()
        try:
            report = without_marks(
                generator.generate(image, template=style.text, accept_any_image=True, **vars(context))
            )
        except ContextError as error:
            row.refused = str(error)
            continue
        except CbedgeError as error:
            count = len(style.findings) + len(style.impression)
            row.add(style, Comparison((("no draft", str(error)),), count, 0), film)
            continue
        row.add(style, compare(style, report, generator, context), film, time.perf_counter() - start)


def _denies(finding: str | None, seen: Sequence[str]) -> bool:
    """Whether a finding that a sentence denies was reported."""
    return finding in seen or (finding == "abnormal" and bool({*seen} - {"device"}))


def _is_explained(sentence: str, warnings: Iterable[str]) -> bool:
    """Whether a warning says that a sentence was left out."""
    return any(w.startswith(f"The template's sentence {sentence!r} was left out because ") for w in warnings)


def _without_names(warning: str) -> str:
    """A warning without the names of findings, so that equal reasons are counted together."""
    return re.sub(r"point to .*?(?= and none of its sentences|\.$|$)", "point to …", warning)


def to_record(rows: Iterable[Row], films: int, seconds: float, model: Path | None = None) -> dict[str, Any]:
    """The counts as JSON."""
    rows = list(rows)
    wanted, found = sum(row.wanted for row in rows), sum(row.found for row in rows)
    strict = wanted + sum(row.unmatched for row in rows)
    return {
        **provenance(f"{films} validation studies of IU X-RAY", model, ("numpy", "onnxruntime", "tokenizers")),
        "seconds": round(seconds, 1),
        "films": films,
        "drafts": sum(row.drafts for row in rows),
        "broken": sum(row.broken for row in rows),
        "uncontradicted": wanted,
        "found": found,
        "share": found / wanted if wanted else 1.0,
        "with_whole_impressions": strict,
        "strict_share": found / strict if strict else 1.0,
        "kept_denials": sum(row.kept_denials.total() for row in rows),
        "rows": [{**vars(row), "share": row.share, "examples": row.examples[:5]} for row in rows],
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        f"# Templates of {len({row['template'] for row in record['rows']})} styles",
        "",
        f"`{record['command']}`, commit {record['commit'][:12]}, {record['machine']['date']}",
        "",
        f"{record['drafts']} drafts of {record['films']} films: {record['broken']} broken; "
        f"{record['found']:,} of {record['uncontradicted']:,} uncontradicted sentences of the templates are in them "
        f"word for word ({record['share']:.1%}); with uncontradicted sentences of impressions that were left out as a "
        f"whole, of {record['with_whole_impressions']:,} ({record['strict_share']:.1%}). "
        f"{record['kept_denials']} sentences in drafts plainly deny a reported finding.",
        "",
        "| template | variant | drafts | broken | word for word | left out with a reason "
        "| of these uncontradicted, in the impression | kept, but deny a finding | seconds a draft | faults |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in record["rows"]:
        if row["refused"]:
            lines.append(f"| {row['template']} | {row['variant']} | refused | | | | | | | {row['refused']} |")
            continue
        faults = ", ".join(f"{name} {count}" for name, count in row["faults"].items()) or "none"
        each = row["seconds"] / max(1, row["drafts"])
        lines.append(
            f"| {row['template']} | {row['variant']} | {row['drafts']} | {row['broken']} | "
            f"{row['found']} of {row['wanted']} ({row['share']:.1%}) | {row['contradicted']} | {row['unmatched']} | "
            f"{row['kept_denials'].total()} | {each:.2f} | {faults} |"
        )
    reasons: Counter[str] = Counter()
    for row in record["rows"]:
        reasons.update(row["reasons"])
    lines += ["", "Sentences left out, by reason:", "", *[f"- {n} × {text}" for text, n in reasons.most_common()]]
    kept: Counter[str] = Counter()
    for row in record["rows"]:
        kept.update({f"{row['template']}: {text}": n for text, n in row["kept_denials"].items()})
    lines += [
        "",
        "Sentences in drafts that plainly deny a reported finding (labelled by hand):",
        "",
        *([f"- {n} × {text}" for text, n in kept.most_common()] or ["none"]),
    ]
    if examples := [f"- {r['template']}, {r['variant']}, {what}" for r in record["rows"] for what in r["examples"]]:
        lines += ["", "Faults (at most five for each row):", "", *examples]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines += ["", f"Machine: {json.dumps(record['machine'])}; {versions}; {record['seconds'] / 60:.1f} minutes."]
    return "\n".join(lines) + "\n"


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder of IU X-RAY.")],
    films: Annotated[int, typer.Option(min=1, help="Validation studies that are drafted.")] = 20,
    variant: Annotated[list[str] | None, typer.Option(help="Only these variants; repeatable.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a bundle.", show_default="embedded")] = None,
    output: Annotated[
        Path,
        typer.Option(help="Record to write: OUTPUT.json and OUTPUT.md.", show_default="benchmarks/results/templates"),
    ] = RESULTS,
) -> None:
    """Draft, print and record; exit with 1 if a draft is broken or more than 5% of the sentences are missing."""
    start, styles = time.monotonic(), read_styles()
    studies = read_studies(data, ("val",))[:films]
    rows: dict[tuple[str, str], Row] = {}
    for name in variant or cpu_variants():
        generator = ReportGenerator.from_pretrained(model, name, "cpu")
        for study in studies:
            draft(generator, study.image, styles, study.context, study.study_id, rows)
    record = to_record(rows.values(), len(studies), time.monotonic() - start, model)
    write_record(record, output, to_markdown(record))
    if record["broken"] or record["share"] < 0.95:
        sys.exit(1)


if __name__ == "__main__":
    app()
