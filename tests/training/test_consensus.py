from pathlib import Path

import pytest

from cbedge.prompt import ClinicalContext, build_target
from training.config import load_config
from training.consensus import ConsensusReports, agreement
from training.datasets import Study
from training.ontology import OPENINGS, TAGS
from training.settings import ConfigError

NAMES = ("cardiomegaly", "effusion", "aorta", "fracture")
SHORT = "Heart size is normal. Lungs are clear."
LONG = "The cardiac silhouette is within normal limits. No pneumothorax or pleural effusion. Bony thorax is intact."
NONE = "No acute disease."


def study(number: int, indication: str, findings: str, impression: str, *tags: str) -> Study:
    values = tuple(int(tag in tags) for tag in TAGS)
    context = ClinicalContext(indication, view="frontal")
    target = build_target(findings, impression)
    return Study(f"s{number}", "train", Path("x.png"), context, target, findings, impression, values)


def known() -> list[Study]:
    short = [study(i, f"chest pain {i}", SHORT, NONE) for i in range(4)]
    long = [study(10 + i, f"XX-year-old woman, dyspnea {i}", LONG, "No acute process.") for i in range(4)]
    odd = study(20, "chest pain 9", f"{SHORT} Left rib fracture.", "Fracture.", "abnormal", "fracture")
    degenerative = f"{SHORT} There are degenerative changes of the spine."
    spine = [study(30 + i, "fall", degenerative, "Spine.", "abnormal", "spine") for i in range(2)]
    return [*short, *long, odd, *spine]


def ask(study: Study, told: tuple[str, ...] | None, context: ClinicalContext | None = None) -> tuple[str, str]:
    return ConsensusReports(known(), NAMES, OPENINGS)(study, context or study.context, told)


def test_a_report_is_worded_as_those_of_studies_whose_indication_reads_alike():
    own = study(99, "chest pain 7", "Something else entirely.", "Else.")
    assert ask(own, ()) == ("", f"FINDINGS: {SHORT} IMPRESSION: {NONE}")
    asked = ClinicalContext("XX-year-old woman, dyspnea", view="frontal")
    assert ask(own, (), asked) == ("", f"FINDINGS: {LONG} IMPRESSION: No acute process.")


def test_a_studys_own_report_has_no_say():
    studies = [*known(), study(50, "hiccups", "No hiccups are seen.", "Hiccups.")]
    consensus = ConsensusReports(studies, NAMES, OPENINGS)
    assert "hiccups" not in consensus(studies[-1], studies[-1].context, ())[1]
    other = study(51, "hiccups", "", "")
    assert "hiccups" in consensus(other, other.context, ())[1]


def test_what_is_told_opens_the_report_and_nothing_after_it_denies_or_adds_a_finding():
    own = study(99, "XX-year-old woman, dyspnea", "x", "x")
    begun, rest = ask(own, ("effusion",))
    assert begun == "FINDINGS: There is a pleural effusion."
    assert rest == " The cardiac silhouette is within normal limits. Bony thorax is intact. IMPRESSION: " + begun[10:]
    begun, rest = ask(own, ("aorta",))
    assert begun == "FINDINGS: The aorta is tortuous."
    assert rest == f" {LONG} IMPRESSION: The aorta is tortuous. No acute process."  # which is not acute
    assert "fracture" not in ask(study(99, "chest pain 9", "x", "x"), ())[1]


def test_what_has_no_sentence_is_worded_as_in_whole_reports_that_say_no_side():
    begun, rest = ask(study(99, "fall", "x", "x"), ("other abnormality",))
    assert begun == "" and "degenerative changes of the spine" in rest
    assert "Left rib" not in ask(study(99, "chest pain 9", "x", "x"), ("fracture",))[1]


def test_a_study_of_which_nothing_is_told_keeps_its_report():
    own = study(99, "chest pain", "Own words.", "Own.")
    assert ask(own, None) == ("", own.target)
    assert ConsensusReports([own], NAMES, OPENINGS)(own, own.context, ()) == ("", own.target)
    assert ConsensusReports([], NAMES, OPENINGS)(own, own.context, ()) == ("", own.target)


def test_of_many_studies_a_part_is_drawn_and_the_same_again():
    studies = [study(i, f"pain {i}", f"Lungs are clear {i}.", NONE) for i in range(30)]
    first, again = (ConsensusReports(studies, NAMES, OPENINGS, seed=3, most=10) for _ in range(2))
    assert [first(s, s.context, ()) for s in studies] == [again(s, s.context, ()) for s in studies]
    assert len({first(s, s.context, ())[1] for s in studies}) <= 10


def test_a_text_agrees_most_with_itself():
    matrix = agreement([SHORT, LONG], [SHORT, LONG, "Nothing of it"])
    assert matrix.argmax(1).tolist() == [0, 1]
    assert matrix[0, 2] == 0


@pytest.mark.parametrize(
    "stage",
    [
        "losses: {language: 1.0}",
        "losses: {language: 1.0, tags: 1.0}, tell_findings: [aorta]",
        "losses: {language: 1.0}, tell_findings: [aorta], open_share: 0.5",
    ],
)
def test_only_a_language_stage_that_tells_findings_can_learn_consensus(tmp_path: Path, stage: str):
    path = tmp_path / "run.yaml"
    path.write_text(f"base: mini\ndata: d\noutput: o\nstages: [{{name: language, learn: consensus, {stage}}}]")
    with pytest.raises(ConfigError, match="learn consensus needs"):
        load_config(path)
