"""The protocol closest to ClinicalBLIP's: findings with impression, nltk's METEOR, ROUGE by rouge-score.

Ji et al. (JMIR Form Res 2024;8:e32690) report METEOR .570 and ROUGE .534 on IU X-RAY and do not name implementations.
nltk's METEOR (stems and WordNet synonyms, weighted towards recall) is about twice that of the Java implementation of
R2Gen and its successors, so the two must not be compared.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.prompt import split_sections
from training.controls import best_constant
from training.datasets.iu_xray import clean_reference, read_studies
from training.records import origin, read_drafts, table
from training.scoring import Scores

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

PAPER = {"METEOR": 0.570, "ROUGE": 0.534}
PROTOCOL = (
    "findings with impression, lower case, no punctuation but the full stop; METEOR by nltk (WordNet 3.0), ROUGE-1 and "
    "ROUGE-L F1 by rouge-score with stemming; means over studies, 95% bootstrap intervals"
)
# WordNet's 45 lexicographer files (lexnames(5WN)); Debian's wordnet-base lacks this file.
_LEXNAMES = Path(__file__).with_name("wordnet_lexnames.tsv")


def open_wordnet(folder: Path | None, scratch: Path) -> WordNetCorpusReader:
    """WordNet 3.0 for nltk, from a folder of its files or, without one, from nltk's own data.

    Args:
        folder: such as ``/usr/share/wordnet`` of Debian's ``wordnet-base``; missing files are created in ``scratch``.
        scratch: an empty folder that exists as long as the reader.

    Raises:
        FileNotFoundError: WordNet is missing; the message says how to get it.
    """
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    if folder is None:
        try:
            nltk.data.find("corpora/wordnet")
        except LookupError:
            raise FileNotFoundError(
                "METEOR by nltk needs WordNet: type `python -m nltk.downloader wordnet`, or install Debian's "
                "wordnet-base and give --wordnet /usr/share/wordnet"
            ) from None
        return nltk.corpus.wordnet
    folder = Path(folder)
    for name in ("data.noun", "index.noun", "noun.exc"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: give the folder of WordNet 3.0's files")
    place = scratch / "corpora" / "wordnet"  # nltk reads from its own data folders only
    place.mkdir(parents=True)
    for path in (p for p in folder.iterdir() if p.is_file()):
        shutil.copyfile(path, place / path.name)
    for name, content in (("lexnames", _LEXNAMES.read_text()), ("index.sense", "")):
        if not (place / name).exists():
            (place / name).write_text(content)
    nltk.data.path.insert(0, str(scratch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing languages
        return WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)


def score_like_paper(drafts: list[str], references: list[str], wordnet: WordNetCorpusReader) -> Scores:
    """METEOR (Banerjee and Lavie 2005, nltk), ROUGE-1 and ROUGE-L (Lin 2004, rouge-score) of whole reports.

    Args:
        drafts, references: cleaned, one each per study.

    Raises:
        ValueError: the lists are empty or of different length.
    """
    if not drafts or len(drafts) != len(references):
        raise ValueError(f"{len(drafts)} drafts for {len(references)} references: give the same number of each")
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    rows = []
    for draft, reference in zip(drafts, references, strict=True):
        f1 = rouge.score(reference, draft)
        rows.append(
            (
                meteor_score([reference.split()], draft.split(), wordnet=wordnet),
                f1["rouge1"].fmeasure,
                f1["rougeL"].fmeasure,
            )
        )
    studies = dict(zip(("METEOR", "ROUGE-1", "ROUGE-L"), np.array(rows).T, strict=True))
    return Scores({name: float(values.mean()) for name, values in studies.items()}, studies)


def evaluate_drafts(
    drafts: Path, data: Path, wordnet: Path | None, progress: Callable[[str], None] = lambda row: None
) -> dict[str, Any]:
    """Score every row of a file of ``evaluate --drafts``, and the best constant report of the train split.

    Raises:
        FileNotFoundError: the file, the data or WordNet is missing.
        ValueError: the file is not a drafts file.
    """
    rows = read_drafts(drafts)
    references = [clean_reference(f"{row['findings']} {row['impression']}") for row in rows]
    train = read_studies(data, ("train",))
    constant = best_constant([clean_reference(f"{s.findings} {s.impression}") for s in train])
    texts = {name: [_whole(row["drafts"][name]) for row in rows] for name in (rows[0]["drafts"] if rows else ())}
    texts["constant"] = [constant] * len(rows)
    record: dict[str, Any] = {"protocol": PROTOCOL, "studies": len(rows), "paper": PAPER, "scores": {}, "intervals": {}}
    with tempfile.TemporaryDirectory() as scratch:
        reader = open_wordnet(wordnet, Path(scratch))
        for name, given in texts.items():
            progress(name)
            scores = score_like_paper(given, references, reader)
            record["scores"][name], record["intervals"][name] = scores.corpus, scores.intervals()
    return record


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table, with the paper's figures in the last row."""
    names = ("METEOR", "ROUGE-1", "ROUGE-L")
    lines = [
        f"# Near the paper's protocol: {record['studies']} studies",
        "",
        f"{origin(record)}. {record['protocol']}.",
        "",
    ]
    rows = []
    for row, scores in record["scores"].items():
        ends = record["intervals"][row]
        rows.append((row, *(f"{scores[name]:.3f} ({ends[name][0]:.3f}–{ends[name][1]:.3f})" for name in names)))
    paper = record["paper"]
    rouge = f"{paper['ROUGE']:.3f} (which ROUGE is not said)"
    rows.append(("ClinicalBLIP as published", f"{paper['METEOR']:.3f}", rouge, ""))
    return "\n".join([*lines, *table(("", *names), rows)]) + "\n"


def _whole(draft: str) -> str:
    return clean_reference(" ".join(part for part in split_sections(draft) if part))
