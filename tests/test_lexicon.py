from pathlib import Path

import pytest

from cbedge import BundleError
from cbedge.drafting.lexicon import Lexicon

REPORTS = ["The lungs are clear, no effusion. Heart normal."] * 10 + ["The rare thymus."]


def test_a_lexicon_follows_words_and_gaps():
    lexicon = Lexicon.compile(REPORTS)
    assert lexicon.follow("", " The") == "The" and lexicon.follow("The", " lungs") == "lungs"
    assert lexicon.follow("", " eff") == "eff" and lexicon.follow("eff", "usion") == "effusion"
    assert lexicon.follow("eff", "ect") is None and lexicon.follow("eff", " clear") is None
    assert lexicon.complete("effusion") and not lexicon.complete("eff")
    assert lexicon.follow("lungs", ", no") == "no" and lexicon.follow("lungs", ";") is None


def test_a_word_of_one_report_and_the_headings_are_not_in_it():
    lexicon = Lexicon.compile([*REPORTS, *["FINDINGS IMPRESSION"] * 5])
    assert not lexicon.knows("thymus") and lexicon.knows("The lungs, clear!")
    assert not lexicon.knows("IMPRESSION") and lexicon.extended(["thymus"]).knows("The thymus")


def test_it_is_saved_as_hashes(tmp_path: Path):
    lexicon, path = Lexicon.compile(REPORTS), tmp_path / "words.npy"
    lexicon.save(path)
    again = Lexicon.load(path)
    assert b"lungs" not in path.read_bytes() and len(again) == len(lexicon)
    assert again.knows("lungs") and again.follow("", " eff") == "eff" and not again.knows("eff")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"words"])
def test_a_damaged_word_list_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "words.npy").write_bytes(content)
    with pytest.raises(BundleError, match=r"words\.npy"):
        Lexicon.load(tmp_path / "words.npy")
