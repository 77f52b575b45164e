import os
from pathlib import Path

import pytest
from conftest import needs_default_model
from test_consensus import LONG, NAMES, NONE, SHORT, known, study

from cbedge.bundles.bundle import DEFAULT_BUNDLE, TEMPLATES
from cbedge.drafting.templates import Templates
from cbedge.prompt import ClinicalContext
from training.consensus import ConsensusReports
from training.datasets.iu_xray import records
from training.ontology import OPENINGS
from training.templates import check_templates, learn_templates, sentence_set


def test_templates_are_made_of_normal_sentences_that_many_reports_share():
    once = study(60, "dyspnea 7", "The thymus of little Ann is normal.", "No acute process.")
    compared = [study(70 + i, "dyspnea", "Heart size is stable.", "No change.") for i in range(4)]
    templates = learn_templates(ConsensusReports([*known(), once, *compared], NAMES, OPENINGS), [])
    assert templates is not None
    shown = " ".join(templates.texts)
    assert SHORT in shown and LONG in shown
    assert not any(word in shown for word in ("Ann", "fracture", "degenerative", "stable"))
    assert learn_templates(ConsensusReports(known()[:2], NAMES, OPENINGS), []) is None
    assert learn_templates(ConsensusReports([], NAMES, OPENINGS), []) is None


def test_the_indication_chooses_the_template_also_where_it_was_never_met():
    templates = learn_templates(ConsensusReports(known(), NAMES, OPENINGS), [])
    assert templates is not None
    assert templates.choose(ClinicalContext("chest pain 77")) == f"FINDINGS: {SHORT} IMPRESSION: {NONE}"
    assert LONG in templates.choose(ClinicalContext("XX-year-old woman, dyspnea 42"))


def test_no_template_has_the_findings_of_a_report():
    reports = ConsensusReports(known(), NAMES, OPENINGS)
    free = learn_templates(reports, [])
    assert free is not None
    taken = [text.partition("IMPRESSION:")[0].removeprefix("FINDINGS:").strip() for text in free.texts]
    composed = learn_templates(reports, taken)
    for text in composed.texts if composed is not None else ():
        assert text.partition("IMPRESSION:")[0].removeprefix("FINDINGS:").strip() not in taken


@needs_default_model
@pytest.mark.skipif("CBEDGE_IU_XRAY" not in os.environ, reason="set CBEDGE_IU_XRAY to the folder of IU X-RAY")
def test_no_embedded_template_has_the_findings_of_a_report_of_the_collection():
    taken = {sentence_set(record.findings or "") for record in records(Path(os.environ["CBEDGE_IU_XRAY"]))}
    assert len(taken) > 2000
    texts = Templates.load(DEFAULT_BUNDLE / TEMPLATES).texts
    assert len(texts) == 48
    check_templates(texts, taken)
    with pytest.raises(ValueError, match="has the findings of a report"):
        check_templates([*texts, f"FINDINGS: {LONG} {SHORT} IMPRESSION: {NONE}"], {sentence_set(f"{SHORT} {LONG}")})
