"""The protocol nearest to ClinicalBLIP's figures: findings with impression, METEOR by nltk, ROUGE by rouge-score.

Ji et al. (JMIR Form Res 2024;8:e32690) report METEOR .570 and ROUGE .534 on IU X-RAY and do not name implementations.
nltk's METEOR (stems and WordNet synonyms, weighed to recall) gives about twice what the Java one of R2Gen's line of
work does, so the two must not be compared.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.prompt import split_sections
from training.controls import best_constant
from training.datasets.iu_xray import clean_reference, read_studies
from training.scoring import Scores

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

PAPER = {"METEOR": 0.570, "ROUGE": 0.534}
PROTOCOL = (
    "findings with impression, lower case, no punctuation but the full stop; METEOR by nltk (WordNet 3.0), ROUGE-1 and "
    "ROUGE-L F1 by rouge-score with stemming; means over studies, 95% bootstrap intervals"
)
# WordNet's 45 lexicographer files (lexnames(5WN)), in order: a file that Debian's wordnet-base leaves out.
_LEXNAMES = (
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
)
_PARTS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def open_wordnet(folder: Path | None, scratch: Path) -> WordNetCorpusReader:
    """WordNet 3.0 for nltk, from a folder of its files or, without one, from nltk's own data.

    Args:
        folder: such as ``/usr/share/wordnet`` of Debian's ``wordnet-base``; what it lacks is made in ``scratch``.
        scratch: an empty folder that outlives the reader.

    Raises:
        FileNotFoundError: WordNet is not there; the message says how to get it.
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
    place = scratch / "corpora" / "wordnet"  # where nltk looks, and it reads from its own data folders alone
    place.mkdir(parents=True)
    for path in (p for p in folder.iterdir() if p.is_file()):
        shutil.copyfile(path, place / path.name)
    lines = [f"{i:02}\t{name}\t{_PARTS[name.split('.')[0]]}" for i, name in enumerate(_LEXNAMES)]
    for name, content in (("lexnames", "\n".join(lines) + "\n"), ("index.sense", "")):
        if not (place / name).exists():
            (place / name).write_text(content)
    nltk.data.path.insert(0, str(scratch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other languages are not there
        return WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)


def score_like_paper(drafts: list[str], references: list[str], wordnet: WordNetCorpusReader) -> Scores:
    """METEOR (Banerjee and Lavie 2005, nltk), ROUGE-1 and ROUGE-L (Lin 2004, rouge-score) of whole reports.

    Args:
        drafts, references: cleaned, one each a study.

    Raises:
        ValueError: the lists are empty or of different length.
    """
    if not drafts or len(drafts) != len(references):
        raise ValueError(f"{len(drafts)} drafts against {len(references)} references: give as many of each")
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
    """Score every row of a drafts file that ``evaluate --drafts`` wrote, beside the best constant report of train.

    Raises:
        FileNotFoundError: the file, the data or WordNet is missing.
        ValueError: the file is no drafts file.
    """
    rows = []
    for number, line in enumerate(Path(drafts).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((clean_reference(f"{row['findings']} {row['impression']}"), row["drafts"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{drafts}, line {number}, is not what evaluate --drafts wrote ({error})") from None
    references = [reference for reference, _ in rows]
    train = read_studies(data, ("train",))
    constant = best_constant([clean_reference(f"{s.findings} {s.impression}") for s in train])
    texts = {name: [_whole(given[name]) for _, given in rows] for name in rows[0][1]} if rows else {}
    texts["constant"] = [constant] * len(rows)
    record: dict[str, Any] = {"protocol": PROTOCOL, "studies": len(rows), "paper": PAPER, "scores": {}, "intervals": {}}
    with tempfile.TemporaryDirectory() as scratch:
        reader = open_wordnet(wordnet, Path(scratch))
        for name, given in texts.items():
            progress(name)
            scores = score_like_paper(given, references, reader)
            record["scores"][name], record["intervals"][name] = scores.corpus, scores.intervals()
    versions = {package: version(package) for package in ("nltk", "rouge-score")}
    return record | {"date": date.today().isoformat(), "versions": versions}


def to_markdown(record: dict[str, Any]) -> str:
    """The record as a table, the paper's figures in its last row."""
    names = ("METEOR", "ROUGE-1", "ROUGE-L")
    lines = [
        f"# Near the paper's protocol: {record['studies']} studies",
        "",
        f"{record['date']}. {record['protocol']}. Command: `{record.get('command', 'unknown')}`",
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for row, scores in record["scores"].items():
        ends = record["intervals"][row]
        cells = (f"{scores[name]:.3f} ({ends[name][0]:.3f}–{ends[name][1]:.3f})" for name in names)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    paper = record["paper"]
    lines.append(
        f"| ClinicalBLIP as published | {paper['METEOR']:.3f} | {paper['ROUGE']:.3f} (which ROUGE is not said) | |"
    )
    return "\n".join(lines) + "\n"


def _whole(draft: str) -> str:
    return clean_reference(" ".join(part for part in split_sections(draft) if part))
