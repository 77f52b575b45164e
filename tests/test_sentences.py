import pytest

from cbedge.sentences import ends_sentence, normalize, split_text


@pytest.mark.parametrize(
    "sentences",
    [
        ["The lungs are clear.", "No effusion."],
        ["A nodule of 1.5 cm is seen.", "Is it new? It is!"],
        ["Is there an effusion? No.", "Is the heart enlarged? No.", "IMPRESSION: Is it new?", "IMP: No."],
        [
            "Lt. lung clear.",
            "Rt. lung clear.",
            "Ht. size normal.",
            "Sup. med. struct. intact.",
            "Th. 4 to Th. 8, max. 3 cm.",
        ],
        ["Costophr. angles sharp.", "Hemidiaph. elevated.", "The mediast. contours are normal."],
        ["Called at 14:30.", "Normal."],
        ["Pulm. vessels normal.", "Trach. midline."],
        ["Unchanged vs. 1.5 yr. ago.", "Stable for 2 yr.", "Lungs clear.", "no effusion."],
        ["Seen by Dr. Hall.", "A nodule of approx. 3 mm, e.g. a granuloma."],
        ["A nodule, approx.", "IMPRESSION: A nodule."],
        ["1. No acute disease.", "2. Normal film."],
        ["IMPRESSION: 1. No acute disease.", "2. Normal film."],
        ["Fig. 2 shows it.", "Effusion: No.", "The rest, etc., is normal."],
        ["Das Herz ist ca. 12 cm breit.", "Kein Erguss."],
        ["Read by J. A. Hall.", "Compare p. 3, fig. 2.", "Clear."],
        ["Kein Erguss, z. B. im Randwinkel, d. h. frei.", "Herz o. B.", "Lunge o. B. im Liegen."],
        ["肺野清晰。", "心影不大。"],
        [
            "The lungs are clear",
        ],
    ],
)
def test_text_is_split_into_its_sentences(sentences: list[str]):
    assert split_text(" ".join(sentences)) == sentences
    assert split_text(f"  {'  '.join(sentences)} ") == sentences


@pytest.mark.parametrize(
    ("text", "ends"),
    [("Clear.", True), ("Clear. ", True), ("Clear", False), ("Seen by Dr.", False), ("1.", False), ("1.5 cm.", True)],
)
def test_the_end_of_a_sentence_is_known(text: str, ends: bool):
    assert ends_sentence(text) == ends


def test_sentences_are_compared_without_case_and_punctuation():
    assert normalize("No  pleural effusion, 1.5 cm!") == normalize("NO PLEURAL EFFUSION 1 5 cm")
