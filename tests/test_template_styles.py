"""Templates of twelve styles in drafts of real films: nothing broken, their sentences word for word."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.templates import Row, Style, broken_by, compare, cpu_variants, draft, read_styles, without_marks
from cbedge import ClinicalContext, Report, ReportGenerator
from tests.conftest import EXAMPLES

STYLES = read_styles()
FILMS = ("chest_pa.png", "chest_pa.dcm")


@pytest.fixture(scope="module", params=cpu_variants())
def generator(request: pytest.FixtureRequest) -> ReportGenerator:
    return ReportGenerator.from_pretrained(variant=request.param, device="cpu")


def faults_in(rows: dict[tuple[str, str], Row], films: int) -> list[str]:
    """Styles of which a draft is broken or missing, or fewer than 95% of the uncontradicted sentences are kept."""
    missing = {style.name for style in STYLES} - {row.template for row in rows.values()}
    return [f"{name}: no draft" for name in missing] + [
        f"{row.template}: {row.refused}, {row.drafts} drafts, {row.broken} broken, {row.share:.1%}, {row.examples}"
        for row in rows.values()
        if row.refused or row.drafts != films or row.broken or not row.wanted + row.contradicted or row.share < 0.95
    ]


@pytest.mark.slow
def test_drafts_of_the_example_films_keep_to_templates_of_any_style(generator: ReportGenerator):
    rows: dict[tuple[str, str], Row] = {}
    for name in FILMS:
        draft(generator, EXAMPLES / name, STYLES, ClinicalContext(), name, rows)
    assert faults_in(rows, len(FILMS)) == []


@pytest.mark.skipif("CBEDGE_IU_XRAY" not in os.environ, reason="set CBEDGE_IU_XRAY to the folder of IU X-RAY")
def test_drafts_of_twenty_real_films_keep_to_templates_of_any_style(generator: ReportGenerator):
    from training.datasets.iu_xray import read_studies

    rows: dict[tuple[str, str], Row] = {}
    for study in read_studies(Path(os.environ["CBEDGE_IU_XRAY"]), ("val",))[:20]:
        draft(generator, study.image, STYLES, study.context, study.study_id, rows)
    assert faults_in(rows, 20) == []


def test_there_are_twelve_styles_each_with_its_sentences_written_down():
    assert len(STYLES) == 12 and all(style.findings for style in STYLES)
    for style in STYLES:
        for sentence in (*style.findings, *style.impression):  # lines are folded, ends are added, nothing else
            assert sentence.rstrip(".") in " ".join(style.text.split()), f"{style.name}: {sentence}"


@pytest.fixture(scope="module")
def kept(generator: ReportGenerator) -> tuple[ReportGenerator, Style, Report]:
    """A whole draft by a template."""
    style = next(style for style in STYLES if style.name == "prose")
    return generator, style, without_marks(generator.generate(EXAMPLES / "chest_pa.png", template=style.text))


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("unknown word", {"text": "FINDINGS: Heart narmol. IMPRESSION: Normal."}),
        ("repeated sentence", {"findings": "Lungs clear. Heart normal. LUNGS CLEAR."}),
        ("repeated sentence", {"impression": "No change. No change."}),
        ("headings", {"text": "FINDINGS: Heart normal. IMPRESSION: Normal. IMPRESSION: Normal."}),
        ("headings", {"text": "FINDINGS: Heart normal."}),
        ("headings", {"text": "IMPRESSION: Normal. FINDINGS: Heart normal."}),
        ("headings", {"impression": None}),
        ("not complete", {"complete": False}),
    ],
)
def test_broken_drafts_are_found(kept: tuple[ReportGenerator, Style, Report], fault: str, changes: dict):
    generator, style, report = kept
    assert broken_by(report, generator.resources.lexicon, [style.text]) == []
    broken = replace(report, **changes)
    assert [name for name, _ in broken_by(broken, generator.resources.lexicon, [style.text])] == [fault]


def test_a_sentence_counts_as_kept_only_word_for_word_in_its_section(kept: tuple[ReportGenerator, Style, Report]):
    generator, style, report = kept
    whole = compare(style, report, generator, ClinicalContext())
    sentence = next(s for s in style.findings if s in report.findings)
    for other in (sentence.lower().capitalize().replace(" ", "  ", 1), sentence[:-1] + "?", ""):
        changed = replace(report, findings=report.findings.replace(sentence, other))
        compared = compare(style, changed, generator, ClinicalContext())
        assert compared.wanted == whole.wanted and compared.found == whole.found - 1
        assert ("left out without a warning", f"findings: {sentence}") in compared.faults


def test_a_sentence_that_denies_a_finding_seen_is_counted(kept: tuple[ReportGenerator, Style, Report]):
    generator, style, report = kept
    sentence = "No pleural fluid or pneumothorax is shown."
    for seen, count in (((), 0), (("device",), 0), (("effusion",), 1)):
        changed = replace(report, image_findings=seen, findings=f"Heart normal. {sentence}")
        found = compare(style, changed, generator, ClinicalContext()).kept_denials
        assert found == (sentence,) * count
