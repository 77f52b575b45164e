"""The sentence splitter for drafts, templates and training.

It handles abbreviations (``Dr.``, ``approx.``, ``e.g.``), initials and other single letters (``J. Hall``, ``z. B.``),
decimal numbers (``1.5 cm``), numbered items (``1. No acute disease.`` is one sentence) and the full stops of Chinese
and Japanese. A question and what follows it are one sentence: its answer says nothing alone. A word before a full stop
and lower case (``Costophr. angles sharp.``) is an abbreviation if it is the first word; others are listed, because many
reports begin sentences in lower case.
"""

from __future__ import annotations

import re

_END = re.compile(r"[.?!]+[\"'”’»)\]]*(?=\s|$)|[。！？]+")
_LAST_WORD = re.compile(r"[^\s(\[]*$")
_LIST_MARK = re.compile(r"(?:^|(?<!\d)[:：])\s*\(?(?:\d{1,2}|[A-Za-z]|[IVX]{2,4}|[ivx]{2,4})$")  # also after a label
_HEADING = re.compile(r"\s*(?:FINDINGS|(?i:imp\w*|concl\w*|opinion|summary)):")
_WITHOUT_FINDING = re.compile(r"\bo\.\s*B$")  # German "o. B.", which ends many sentences
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        "dr mr mrs ms prof approx appr ca cf vs resp bzw incl inkl ggf evtl env e.g i.e z.b d.h u.a o.g p.ex lt rt ht "
        "hx th inf sup med lat ant max min vol struct cardiomed bilat "
        "costophr hemidiaph mediast pulm",
    )
)
_BEFORE_LOWER_CASE = frozenset(("etc", "yr", "yrs", "mo", "wk"))
_BEFORE_NUMBER = frozenset(("no", "nr", "fig", "abb"))


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of every sentence in a text, without surrounding white space. The last sentence may be incomplete.

    Line breaks count as white space; :func:`cbedge.drafting.template_parser.parse_template` handles lines.
    """
    spans: list[tuple[int, int]] = []
    start = _skip(text, 0)
    for found in _END.finditer(text):
        if found.start() >= start and _ends(text, start, found):
            spans.append((start, found.end()))
            start = _skip(text, found.end())
    if start < len(text) and (rest := text[start:].rstrip()):
        spans.append((start, start + len(rest)))
    return spans


def split_text(text: str) -> list[str]:
    """The sentences of a text."""
    return [text[start:end] for start, end in sentence_spans(text)]


def ends_sentence(text: str) -> bool:
    """Whether a text ends with a complete sentence."""
    last = max((found.end() for found in _END.finditer(text)), default=-1)
    if last != len(text.rstrip()):
        return False
    return len(sentence_spans(f"{text.rstrip()} The")) > len(sentence_spans(text))


def normalize(sentence: str) -> str:
    """Normalize a sentence for comparison: words and numbers in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _ends(text: str, start: int, found: re.Match[str]) -> bool:
    if _HEADING.match(text, found.end()):
        return True
    following = text[_skip(text, found.end()) :][:1]
    if "?" in found.group() or "？" in found.group():
        return not following
    if found.group() != ".":
        return True
    before = text[start : found.start()]
    if _LIST_MARK.search(before):
        return False
    match = _LAST_WORD.search(before)
    word = match.group().lower() if match else ""
    if _WITHOUT_FINDING.search(before):
        return not following.islower()
    if len(word) == 1 and word.isalpha():  # an initial, "z. B.", "p. 3"
        return not following
    if word in _ABBREVIATIONS:
        return not following
    if word in _BEFORE_NUMBER:
        return not following.isdigit()
    if word in _BEFORE_LOWER_CASE or ("." in word and not word[0].isdigit()):
        return not following.islower() and not following.isdigit()
    return not (following.islower() and before.istitle() and before.isalpha())
