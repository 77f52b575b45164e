import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbedge import BundleError, ClinicalContext, ContextError
from cbedge.drafting.language import are_english
from cbedge.drafting.template_parser import parse_template, read_template
from cbedge.drafting.templates import Template, Templates, context_features
from cbedge.sentences import split_text

TEXTS = ("FINDINGS: Lungs are clear. IMPRESSION: Normal chest.", "FINDINGS: No effusion. IMPRESSION: No acute disease.")


def templates() -> Templates:
    """The second one is usual where somebody coughs, the first everywhere else."""
    weights = np.zeros((512, 2), np.float32)
    (cough, _), (always, _) = (context_features(c, 512) for c in (ClinicalContext("cough"), ClinicalContext()))
    weights[np.setdiff1d(cough, always), 1] = 1.0
    return Templates(TEXTS, weights, np.array([0.5, 0.0], np.float32))


def test_the_template_is_chosen_by_indication(tmp_path: Path):
    templates().save(tmp_path / "templates.npz")
    for known in (templates(), Templates.load(tmp_path / "templates.npz")):
        assert known.texts == TEXTS
        assert known.choose(ClinicalContext()) == known.choose(ClinicalContext(view="frontal")) == TEXTS[0]
        assert known.choose(ClinicalContext("cough")) == TEXTS[1]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_file_that_holds_no_templates_is_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "templates.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"templates\.npz"):
        Templates.load(path)
    np.savez(path, texts=np.array(TEXTS), weights=np.zeros((4, 3), np.int8), scale=np.ones(3), bias=np.zeros(3))
    with pytest.raises(BundleError, match=r"templates\.npz"):
        Templates.load(path)


@pytest.mark.parametrize("text", ["", " .", "IMPRESSION: Normal.", "FINDINGS:", "x" * 4001, None])
def test_what_is_no_normal_report_is_refused(text: str):
    with pytest.raises(ContextError, match="template"):
        read_template(text)


def test_a_template_is_cleaned_and_headed():
    assert read_template("Lungs\nare  clear. <|im_end|> IMPRESSION: Normal chest") == TEXTS[0]
    assert read_template("The chest is normal") == "FINDINGS: The chest is normal."
    assert read_template(read_template(TEXTS[1])) == TEXTS[1]


PROSE = "The lungs are clear. No pleural effusion, approx. 1.5 cm e.g. at the apex. Heart resp. spine normal. No mass."
FORM = """TECHNIQUE: PA and lateral views
Lungs: Clear
- HEART: normal in size, 12.5 cm.
• The ribs, the spine and the soft tissues that this film shows are without
  acute abnormality
Opinion:
1. No acute disease
2. Normal film.
"""


def test_prose_is_read_in_sentences_that_know_abbreviations_and_decimals():
    assert parse_template(PROSE).findings == (
        "The lungs are clear.",
        "No pleural effusion, approx. 1.5 cm e.g. at the apex.",
        "Heart resp. spine normal.",
        "No mass.",
    )


def test_a_form_keeps_its_labels_and_numbers_and_its_own_headings_are_mapped():
    template = parse_template(FORM)
    assert template.findings == (
        "Lungs: Clear.",
        "HEART: normal in size, 12.5 cm.",
        "The ribs, the spine and the soft tissues that this film shows are without acute abnormality.",
    )
    assert template.impression == ("1. No acute disease.", "2. Normal film.")


@pytest.mark.parametrize(
    ("heading", "impression"),
    [
        ("CONCLUSION", True),
        ("Comment", True),
        ("Beurteilung", True),
        ("IMPRESSION", True),
        ("Result", True),
        ("印象", True),
        ("Lungs", False),
        ("TECHNICAL QUALITY", False),
    ],
)
def test_headings_that_stand_for_impression_are_known(heading: str, impression: bool):
    for text in (f"Heart normal.\n{heading}: All well.", f"Heart normal. {heading}: All well."):
        template = parse_template(text)
        assert template.impression == (("All well.",) if impression else ())
        assert impression or template.findings[-1] == f"{heading}: All well."


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("Parenchyma: no consolidation. Costophrenic recesses: no effusion.", True),
        ("Skeleton: normal. Pulmonary vascularity: normal.", True),
        ("Cuore normale. Non versamento pleurico.", False),
        ("Corazón normal. No hay derrame pleural.", False),
        ("No derrame. No neumotórax. Corazón normal.", False),
        ("Coração normal. Sem derrame pleural.", False),
        ("Geen pleuravocht. Hart niet vergroot.", False),
        ("No fibrosis. No residual changes.", True),
        ("No collapse. No atelectatic change. Atelectasis: N/A.", True),
        ("No implanted device. No ICD.", True),
        ("Heart: WNL. Parenchyma: NAD. No infiltration.", True),
        ("Das Herz ist normal groß. Kein Pleuraerguss.", False),
        ("Le cœur est de taille normale. Pas d'épanchement pleural.", False),
        ("Лёгкие чистые.", False),
        ("THE HEART IS NORMAL. LUNGS CLEAR.", True),
        ("No haemothorax. The oesophagus is not dilated.", True),
    ],
)
def test_the_language_of_a_template_is_told_by_its_words(text: str, english: bool):
    template = parse_template(text)
    assert all(are_english([*template.findings, *template.impression])) == english


def test_marks_of_markdown_are_dropped_and_its_headings_known():
    template = parse_template("## Findings\n**Lungs:** clear.\n- Heart normal.\n\n# **Impression**\nNo acute disease.")
    assert template.findings == ("Lungs: clear.", "Heart normal.")
    assert template.impression == ("No acute disease.",)


@pytest.mark.parametrize(
    "text",
    ["FINDINGS: The lungs are clear IMPRESSION: Normal.", "The lungs are clear FINDINGS: Heart normal."],
)
def test_a_heading_inside_a_sentence_is_refused(text: str):
    with pytest.raises(ContextError, match="inside a sentence: put the heading on its own line"):
        parse_template(text)


def test_a_sentence_that_a_section_says_twice_is_taken_once_and_told():
    template = parse_template("Lungs clear. Heart normal.\nLUNGS CLEAR! \nIMPRESSION: Lungs clear.")
    assert (template.findings, template.impression) == (("Lungs clear.", "Heart normal."), ("Lungs clear.",))
    assert template.left_out == (
        "Line 2 of the template repeats a sentence of its section: this sentence was left out.",
    )


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("Effusion\nNone.\nPneumothorax\nNone.", ["Effusion: None.", "Pneumothorax: None."]),
        ("LUNGS\nNormal\n\nHEART\n\nNormal", ["LUNGS: Normal.", "HEART: Normal."]),
        ("CHEST PA\nLUNGS\nNormal.", ["CHEST PA.", "LUNGS: Normal."]),
        (
            "Airway\nTrachea midline.\nNo mass.\nBones\nIntact",
            ["Airway: Trachea midline.", "No mass.", "Bones: Intact."],
        ),
        ("CXR - PA erect\n\nBoth lungs are quite clear.", ["CXR - PA erect.", "Both lungs are quite clear."]),
        (
            "=== Lungs ===\nClear.\n--- Pleura ---\nClear.\nHeart;\nNormal",
            ["Lungs: Clear.", "Pleura: Clear.", "Heart: Normal."],
        ),
        ("Effusion -\nPneumothorax -\nHeart normal.", ["Effusion -.", "Pneumothorax -.", "Heart normal."]),
        ("Effusion\n-\nPneumothorax\n(-)", ["Effusion: -.", "Pneumothorax: (-)."]),
        ("Pleura\nNo effusion\nBones\n\nHeart normal", ["Pleura: No effusion.", "Bones.", "Heart normal."]),
        ("Lungs clear\nHeart normal\nTrachea midline", ["Lungs clear.", "Heart normal.", "Trachea midline."]),
        (
            "Is there an effusion? No. Is the heart enlarged? No.\nAre the lungs clear?\nYes.",
            ["Is there an effusion? No.", "Is the heart enlarged? No.", "Are the lungs clear? Yes."],
        ),
        (
            "Lt. lung clear. Rt. lung clear. Inf. lobes clear.",
            ["Lt. lung clear.", "Rt. lung clear.", "Inf. lobes clear."],
        ),
    ],
)
def test_a_heading_or_a_question_is_one_sentence_with_its_answer(text: str, findings: list[str]):
    for heading in ("", "FINDINGS\n", "Results:\n", "Findings\n\n"):
        template = parse_template(f"{heading}{text}\nImpression: Normal chest.")
        assert template == Template(tuple(findings), ("Normal chest.",))


ONE_STUDY = """
CLINICAL INFO, CLINICAL DETAILS, CLINICAL INDICATION, CLINICAL DATA, CLINICAL QUESTION, HX, REASON FOR EXAMINATION,
REASON FOR REQUEST, Reason for Exam (Clinical), PATIENT HISTORY, PROVIDED HISTORY, SYMPTOMS, SIGNS AND SYMPTOMS,
COMPARISON STUDY, PRIOR(S), PRIORS, STUDY, EXAM DATE, DATE, REQUESTED BY, REFERRER,
ATTENDING, COMMUNICATION, ICD-10, CRITICAL RESULTS, ADDENDUM, INDICATION/HISTORY, INDICATION AND HISTORY,
Anamnese, Klinik, Motivo, Datos clínicos
"""


@pytest.mark.parametrize("heading", re.split(r",\s+", ONE_STUDY.strip()))
def test_headings_of_one_study_are_known_by_their_words(heading: str):
    for text in (
        f"Lungs clear.\n{heading}: Fever.\nIMPRESSION: Normal chest.",
        f"{heading}: Fever and cough.\nSmoker.\n\nFINDINGS:\nLungs clear.\nIMPRESSION:\nNormal chest.",
        f"{heading}: Fever and cough.\nLungs clear.\nIMPRESSION: Normal chest.",
    ):
        template = parse_template(text)
        assert (template.findings, template.impression) == (("Lungs clear.",), ("Normal chest.",))
        (told,) = template.left_out
        assert told.startswith(f"The template's {heading.upper()} (line ")


def test_text_under_a_heading_of_one_study_goes_on_up_to_a_blank_line():
    for heading in ("CLINICAL INFO", "CI", "History"):
        template = parse_template(f"{heading}: Fever.\nSmoker.\nNo fall.\n\nLungs clear.\n\nConclusion: All well.")
        assert template.findings == ("Lungs clear.",)
        assert template.left_out == (
            f"The template's {heading.upper()} (line 1) holds for one study only and was left out.",
        )


def test_text_before_the_heading_of_the_findings_is_told_and_not_drafted():
    template = parse_template("XR CHEST, two views.\nClinical note. Lungs: Normal.\nFINDINGS\nHeart normal.")
    assert template.findings == ("Heart normal.",)
    told = "of the template stands before its findings: this sentence was left out."
    assert template.left_out == (f"Line 1 {told}", f"Line 2 {told}")
    other_way = parse_template("IMPRESSION: Normal chest.\nFINDINGS: Heart normal.")
    assert other_way == Template(("Heart normal.",), ("Normal chest.",))


@pytest.mark.parametrize(
    ("findings", "impression"),
    [
        ("=== FINDINGS ===", "=== IMPRESSION ==="),
        ("--- Findings ---", "--- Impression ---"),
        ("FINDINGS/", "IMPRESSION/"),
        ("Findings;", "Impression;"),
        ("**Findings**", "**Impression**"),
        ("* Findings *", "_Impression_"),
        ("FINDINGS\n--------", "IMPRESSION\n=========="),
        ("CHEST FINDINGS:", "Final impression:"),
        ("Radiological findings:", "IMPRESSION(S):"),
        ("FINDING(S)", "Impression/Plan:"),
        ("Findings =", "Imp ="),
        ("Report:", "IN SUMMARY:"),
        ("Findings", "BOTTOM LINE"),
        ("FINDINGS (chest):", "IMPRESSION (final):"),
        ("1. FINDINGS", "2) My impression:"),
        ("<<FINDINGS>>", "<<IMPRESSION>>"),
        ("ＦＩＮＤＩＮＧＳ：", "ＩＭＰＲＥＳＳＩＯＮ："),
    ],
)
def test_decoration_and_adjectives_of_headings_do_not_count(findings: str, impression: str):
    template = parse_template(f"{findings}\nLungs clear.\n{impression}\nNormal chest.")
    assert template == Template(("Lungs clear.",), ("Normal chest.",))


@pytest.mark.parametrize(
    "text", ["Findings Lungs clear. Impression Normal chest.", "FINDINGS Lungs clear.\nCONCLUSION Normal chest."]
)
def test_a_heading_without_a_colon_before_its_text_is_known(text: str):
    assert parse_template(text) == Template(("Lungs clear.",), ("Normal chest.",))
    assert parse_template("Findings Lungs: Clear.").findings == ("Lungs: Clear.",)
    for sentence in ("Findings consistent with a normal chest.", "FINDINGS ARE NORMAL."):
        assert parse_template(sentence).findings == (sentence,)


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        (
            "The lungs are clear without pneumonia,\nCHF or effusion. The heart, hila and\nCP angles are normal.",
            [
                "The lungs are clear without pneumonia, CHF or effusion.",
                "The heart, hila and CP angles are normal.",
            ],
        ),
        ("No acute disease. No\nPneumonia.", ["No acute disease.", "No Pneumonia."]),
        (
            "There is no\nPneumonia or\nEffusion. Heart is\nNormal.",
            ["There is no Pneumonia or Effusion.", "Heart is Normal."],
        ),
        ("Unchanged since\nAugust. No nodule on this\nFilm.", ["Unchanged since August.", "No nodule on this Film."]),
        ("Effusion no\nPneumothorax no\nHeart normal", ["Effusion no.", "Pneumothorax no.", "Heart normal."]),
        ("clear lungs\nnormal heart\nno fracture.", ["clear lungs.", "normal heart.", "no fracture."]),
        (
            "clear lungs without\nopacity or\neffusion\nnormal heart",
            ["clear lungs without opacity or effusion.", "normal heart."],
        ),
        (
            "heart size and contours\nwithin normal limits\nno scar",
            ["heart size and contours within normal limits.", "no scar."],
        ),
        ("the heart is normal. no focal\nopacity.", ["the heart is normal.", "no focal opacity."]),
        (
            "Heart normal in size, contour\nand position\nLungs clear",
            ["Heart normal in size, contour and position.", "Lungs clear."],
        ),
    ],
)
def test_a_sentence_goes_on_in_the_next_line_where_it_cannot_end(text: str, findings: list[str]):
    for heading in ("", "FINDINGS: ", "Findings\n"):
        assert parse_template(f"{heading}{text}\n\nImpression: Normal chest.").findings == tuple(findings)


BLANKS = (
    "___ XXXX <side> *** ......... … ??? {normal/enlarged:12345} {Desc;a:1} ${lungs} {{pleura}} $heart$ %LUNGS% "
    "@AGE@ [normal] [<size>] [x] ☐ □ ☑ ✓ ✔ ✗ ✘ ❌ ○ (x) () normal/enlarged"
)


@pytest.mark.parametrize("blank", [*BLANKS.split(), "No / small", "clear / show", "{{ pleura }}", "[ ]", "( )"])
def test_a_template_with_blanks_is_refused(blank: str):
    with pytest.raises(ContextError, match="blank") as refused:
        parse_template(f"The lungs are clear. The effusion measures {blank} cm.")
    assert f"({blank[:20]})" in str(refused.value)


@pytest.mark.parametrize("mark", ["o", "x", "✗", "( )", "(X)", "✔"])
def test_a_check_list_is_refused(mark: str):
    with pytest.raises(ContextError, match="blank") as refused:
        parse_template(f"FINDINGS:\n {mark} Effusion present\nIMPRESSION: Normal")
    assert f"({mark})" in str(refused.value)


def test_slashes_dates_and_marks_of_ordinary_reports_are_no_blanks():
    text = "AP/lateral views 12/2024. No effusion and/or pneumothorax w/o change. Heart/mediastinum: normal. CTR < 0.5."
    assert " ".join(parse_template(text).findings) == text
    emphasis = "***Lungs*** are **clear**.\n*****\n*Heart normal.*\n_Spine_ normal.\n* *No* _free air_"
    assert parse_template(emphasis).findings == (
        "Lungs are clear.",
        "Heart normal.",
        "Spine normal.",
        "No free air.",
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"{\rtf1 FINDINGS: Lungs are clear.\par IMPRESSION: None.}", "RTF"),
        ("<p><b>FINDINGS:</b> The heart is normal.</p>", "HTML"),
        ("The lungs are clear.&nbsp;No effusion.", "HTML"),
        ('{"findings": "The lungs are clear."}', "JSON"),
        ('section,text\nfindings,"The heart is normal."', "CSV"),
        ("| Heart | Normal |\n|---|---|", "a table"),
        ("OBX|1|TX||FINDINGS: The heart is normal.", "a table"),
        ("// normal chest v3\nThe lungs are clear.", "a comment"),
        (r"The heart is normal.\nThe lungs are clear.", "an escape sequence"),
    ],
)
def test_a_format_that_is_no_plain_text_is_refused_by_name(text: str, name: str):
    with pytest.raises(ContextError, match=f"has {name} .*plain text"):
        parse_template(text)


@pytest.mark.parametrize(
    "name",
    ["normal.txt", "my report.txt", "templates/normal", "Normal", "/home/me/normal report", r"C:\me\a normal one"],
)
def test_a_file_name_or_a_word_is_no_template(name: str):
    with pytest.raises(ContextError, match="file name or a single word"):
        parse_template(name)


@pytest.mark.parametrize(
    "text",
    [
        "INDICATION: Cough. Fever.\nTECHNIQUE: PA and lateral.\nRESULT:\nHeart normal.\nCONCLUSION: All well.",
        "EXAM: Chest.\nLungs: Clear.\nRESULTS: Heart normal.\nOpinion: All well.",
        "[FINDINGS] Heart normal.\n[IMPRESSION]\nAll well.",
        "FINDINGS - Heart normal.\nIMPRESSION – All well.",
        "FIND: Heart normal.\nIMP: All well.",
        "REPORT\nHeart normal.\nCONCL.: All well.",
    ],
)
def test_sections_under_headings_of_other_styles(text: str):
    template = parse_template(text)
    assert template.findings[-1] == "Heart normal."
    assert len(template.findings) == 1 + ("Lungs" in text)
    assert template.impression == ("All well.",)


def test_french_sections_are_read_without_indication_and_technique():
    template = parse_template(
        "INDICATION : toux\nTECHNIQUE : face\nRÉSULTATS :\nPas d'épanchement pleural.\nCONCLUSION : Normal."
    )
    assert (template.findings, template.impression) == (("Pas d'épanchement pleural.",), ("Normal.",))


def test_roman_numbers_stay_with_their_items():
    assert parse_template("FINDINGS:\nI. Lungs clear.\nII. Heart normal.\nIV. No mass.").findings == (
        "I. Lungs clear.",
        "II. Heart normal.",
        "IV. No mass.",
    )


def test_invisible_characters_are_removed_and_joiners_of_persian_stay():
    assert parse_template("The medi\u00adastinum is nor\u200bmal\ufeff.").findings == ("The mediastinum is normal.",)
    assert parse_template("<|im_\u00adend|>Heart normal.").findings == ("Heart normal.",)
    assert parse_template("قلب نمی\u200cباشد.").findings == ("قلب نمی\u200cباشد.",)


PRIVATE = {
    "a signature": [
        "Electronically signed by Dr. Jo Smith on 01/02/2024 at 14:55.",
        "Dictated by: Jo Smith MD",
        "/s/ Jo Smith",
        "Signed: Jo Smith",
        "Read by: JS",
        "Radiologist: Jo Smith",
        "Dr. Jo Smith",
        "Jo Smith, M.D.",
        "Firmado por Jo Smith",
        "gez. Jo Smith",
    ],
    "patient data": [
        "Patient: John Doe, DOB 01/02/1950, MRN 123456.",
        "Patient's name: Doe",
        "Accession #: A-77",
        "Sex: F",
        "No change in Mrs. Doe.",
        "Referring physician: Jo Smith",
        "This is a 64-year-old woman.",
        "Cough, 45 y.",
        "45yo with fever.",
        "ACC#: 77",
    ],
    "a communication": [
        "Findings were discussed with Dr. Smith by telephone at 14:30.",
        "Called to ward 5 by J. Doe.",
        "The ED was notified.",
        "Results were communicated to the referring team.",
        "Thank you for this referral.",
        "Dear Dr. Jones,",
    ],
    "a name": ["Seen by Dr. Hall.", "Compared by J. Doe."],
    "a place": ["Room 12, bed 3.", "Ward 5."],
    "a time of day": ["Film taken at 14:30.", "Seen at 3 pm."],
    "a date": ["Compared with 01/02/2024.", "Date 2024-01-02.", "Seen on 2 January 2024.", "As of Mar 3, 2023."],
    "an identifier or an address": ["Call 555-1234.", "Mail jo.smith@hospital.example.", "Order 12345678."],
}


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in PRIVATE.items() for line in lines])
def test_what_holds_for_one_study_or_person_is_left_out_and_told_without_its_text(kind: str, line: str):
    told = f"of the template has what looks like {kind}: this sentence was left out."
    for text, number in (
        (f"{line}\nFINDINGS: Lungs clear.\nIMPRESSION: Normal chest.", 1),
        (f"FINDINGS: Lungs clear.\nIMPRESSION: Normal chest.\n\n{line}", 4),
        (f"Lungs clear. {line}\nIMPRESSION: Normal chest.", 1),
    ):
        template = parse_template(text)
        assert (template.findings, template.impression) == (("Lungs clear.",), ("Normal chest.",))
        assert template.left_out == (f"Line {number} {told}",)


def test_time_since_another_study_is_no_age():
    text = "Lungs clear, unchanged vs. 1.5 yr. ago. Heart as 2 yrs ago."
    assert " ".join(parse_template(text).findings) == text


def test_a_signature_of_several_lines_is_left_out_up_to_the_next_sentence():
    template = parse_template("Lungs clear.\nSigned by\nJo Smith\nGeneral Hospital\nHeart normal.\nSkeleton normal")
    assert template.findings == ("Lungs clear.", "Heart normal.", "Skeleton normal.")
    assert [told.split(" of ")[0] for told in template.left_out] == ["Line 2", "Line 3", "Line 4"]
    letter = parse_template("Dear Dr. Jones,\n\nLungs clear.\n\nKind regards\nJane Doe")
    assert letter.findings == ("Lungs clear.",)


def test_headings_of_one_study_are_told_if_they_have_text():
    template = parse_template("INDICATION: Cough.\nHISTORY:\nTECHNIQUE\nPA view\nCOMPARISON:\n\nFINDINGS: Lungs clear.")
    assert template.findings == ("Lungs clear.",)
    assert template.left_out == (
        "The template's INDICATION (line 1) holds for one study only and was left out.",
        "The template's TECHNIQUE (line 3) holds for one study only and was left out.",
    )
    for findings in ("FINDINGS: Lungs clear.\nHeart normal.", "Findings\nLungs clear.\nFindings\nHeart normal."):
        several = parse_template(f"INDICATION: Cough. Fever.\nSmoker.\n\nNo fall.\n{findings}")
        assert several.findings == ("Lungs clear.", "Heart normal.")
        assert several.left_out == template.left_out[:1]


@settings(deadline=None)
@given(st.lists(st.sampled_from([*PROSE.split(". "), *FORM.splitlines()]), min_size=1, max_size=12))
def test_a_template_that_was_read_reads_the_same_again(lines: list[str]):
    try:
        template = parse_template("\n".join(lines))
    except ContextError:
        return
    assert parse_template(template.text).text == template.text


LANGUAGES = {
    "German": "Kein Pleuraerguss. Zwerchfell glatt. Hili schlank. Pneumonie rechts. Keine Infiltrate. Aorta elongiert.",
    "French": "Pas d'épanchement. Cœur de volume normal. Culs-de-sac libres. Silhouette cardiaque normale.",
    "Spanish": "No derrame. Silueta cardiaca normal. Senos libres. No infiltrados. Estructuras oseas sin alteraciones.",
    "Italian": "Cuore nei limiti. Non versamento pleurico. No versamento. Nella norma. Ili nella norma.",
    "Portuguese": "Pulmões sem opacidades. Sem alteracoes. Exame normal. Seios costofrênicos livres.",
    "Dutch": "Hart niet vergroot. Geen pleuravocht. Longen schoon. Scherpe sinussen.",
    "Swedish": "Hjärtat normalstort. Inga infiltrat. Lungorna är klara. Ej stas.",
    "Polish": "Serce niepowiększone. Pluca bez zmian. Kąty wolne. Obraz prawidłowy.",
}
ABNORMAL_ENGLISH = """Right lower lobe consolidation with air bronchograms. Small right effusion. Left pacemaker.
Pneumonia. Stable cardiomegaly. Sternotomy wires intact. Heart diameter 12.5 cm, CTR .45. Costophr. angles sharp.
MSK: normal. ET tube 3 cm above carina. Non-specific opacity. Delayed film, do not repeat. No infiltrate."""


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_in_another_language_is_known_also_among_english_ones(language: str):
    english = ["The heart is normal.", "No effusion.", "Lungs clear."]
    for foreign in split_text(LANGUAGES[language]):
        assert are_english([*english, foreign]) == [True, True, True, False], foreign


def test_english_sentences_of_abnormalities_numbers_and_abbreviations_are_english():
    sentences = split_text(ABNORMAL_ENGLISH)
    assert [text for text, english in zip(sentences, are_english(sentences), strict=True) if not english] == []
