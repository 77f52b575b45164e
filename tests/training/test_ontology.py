from pathlib import Path

import pytest

from training.findings import find_mentions
from training.ontology import DENIALS, ONTOLOGY, OPENINGS, PATH, TAG_FINDINGS, TAGS, read_ontology


def test_every_field_of_an_entry_reaches_what_uses_it():
    heart = ONTOLOGY["cardiomegaly"]
    assert TAGS[:2] == ("abnormal", "cardiomegaly") and TAG_FINDINGS["cardiomegaly"] == heart.read_as
    assert (
        OPENINGS["cardiomegaly"] == heart.opening == "The heart is enlarged."
        and DENIALS["cardiomegaly"] == heart.denials
    )
    assert "<" not in "".join(heart.denials).replace("(?<", "")  # parts are filled in
    assert (
        not ONTOLOGY["edema"].is_tag and "edema" not in TAGS and ONTOLOGY["hyperinflation"].excludes == ("low volume",)
    )


def test_what_findings_are_read_as_is_known_to_the_reader_of_reports():
    groups = {group for finding in ONTOLOGY.values() for group in finding.read_as}
    said = {mention.finding for mentions in find_mentions([" ".join(OPENINGS.values())]) for mention in mentions}
    assert said <= groups


def test_a_new_finding_is_one_entry(tmp_path: Path):
    path = tmp_path / "ontology.yaml"
    text = PATH.read_text()
    path.write_text(f"{text}  cyst:\n    opening: There is a cyst.\n    denials: ['<none>.*cyst']\n    nih: [Cyst]\n")
    cyst = read_ontology(path)["cyst"]
    assert (cyst.opening, cyst.nih, cyst.is_tag) == ("There is a cyst.", ("Cyst",), True)
    assert cyst.denials[0].endswith(".*cyst") and "without" in cyst.denials[0]


@pytest.mark.parametrize(
    ("entry", "told"), [("denail: x", "unknown field 'denail'"), ("opening: [a]", "opening of cyst must be a str")]
)
def test_a_wrong_entry_is_named(entry: str, told: str, tmp_path: Path):
    path = tmp_path / "ontology.yaml"
    path.write_text(f"parts: {{}}\nfindings:\n  cyst: {{{entry}}}\n")
    with pytest.raises(ValueError, match=told):
        read_ontology(path)
