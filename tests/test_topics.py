import pytest

from cbedge.topics import Topic, left_out

TOPICS = (Topic("pleura", ("pleura", "effusion"), "There is no"), Topic("bones", ("osseous", "rib"), "The bones"))


@pytest.mark.parametrize(
    ("findings", "missing"),
    [
        ("", ["pleura", "bones"]),
        ("The heart is normal. No PLEURAL effusion.", ["bones"]),
        ("Ribs are intact.", ["pleura"]),
        ("No effusion. Osseous structures are intact.", []),
    ],
)
def test_what_a_text_does_not_speak_of_is_found(findings: str, missing: list[str]):
    assert [topic.name for topic in left_out(TOPICS, findings)] == missing


@pytest.mark.parametrize(("words", "start"), [((), "The"), (("",), "The"), (("bone",), " ")])
def test_a_topic_that_says_nothing_is_refused(words: tuple[str, ...], start: str):
    with pytest.raises(ValueError, match="'bones' needs"):
        Topic("bones", words, start)
