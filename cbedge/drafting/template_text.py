"""The lines of a template's text, and the headings in them."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

from cbedge.sentences import ends_sentence, split_text

WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words)
    for name, words in json.loads(Path(__file__).with_name("template_words.json").read_text(encoding="utf-8")).items()
}
"""Headings of several languages by meaning (``findings``, ``impression``, ``findings_or_impression``, which depends on
the place), and ``adjectives`` before them; the words of headings of what is true of one study only (``not_drafted``);
words of statements, which no heading has (``stating``); and words after which a sentence goes on, some of which
(``determining``) can begin one and others (``linking``) cannot. All in lower case."""

_NAME = r"([^\W\d_][\w /&()#'’-]{0,50}?)"
HEADING = re.compile(rf"{_NAME}\.?\s*[:：=]\s*")
_MARKED_HEADING = re.compile(rf"(?:\[\s*{_NAME}\s*\]\s*[:：]?|{_NAME}\s*[-–—](?=\s|$))\s*")  # without a colon
_UNMARKED_HEADING = re.compile(r"(?:^|(?<=[.?!] ))((?i:findings?|impressions?|conclusions?)) (?=(?!And )[A-Z][a-z])")
_BRACKETS = re.compile(r"\s*\([^()]*\)")
_RULE = re.compile(r"(?!\(.\)$)[^\w\s]{3,}|[*.]")  # "-----"; "-" and "(-)" are answers
_FRAME = re.compile(r"^([=*#~_<>]+|-{2,})\s*|\s*([=*#~_<>;]+|-{2,})$")
_DECORATION = " \t=*#_<>[]{}/;.:：~-–—"
_NOT_DRAFTED = re.compile(r"(relevant )?(clinical|klinische|reasons?)\b(?!.*correlat).*|.*\bhistory")
_TITLE = re.compile(r"[^\W\d_][\w /&()'’-]{1,40}")  # a short line without punctuation
_LABEL = re.compile(r"[^\W\d_][\w /&(),-]{0,40}\.?[:：](?=\s|$)")
_ITEM = re.compile(r"\(?(?:\d{1,2}|[IVXivx]{1,4})[.)]\s")
_BULLET = re.compile(r"^\s*[-*•·‣◦▪–—#]+\s+")
_TITLE_WORDS = 4
_WRAPPED = 50  # characters: a line at least this long without a full stop continues in the next line
_STOP = re.compile(r"[.?!](?:\s|$)")


def lines_of(text: str) -> list[tuple[int, int, str]]:
    """The lines of a text, each with its number from 1 and that of its paragraph: white space normalized, bullets
    and rules removed, wrapped sentences joined, a line that is a heading joined by a colon with its answer, the
    next line."""
    lines: list[tuple[int, int, str]] = []
    fresh, listed, previous, paragraph = True, False, "", 0
    numbered = [(number, *_clean(raw)) for number, raw in enumerate(text.splitlines(), 1)]
    numbered = [row for row in numbered if not _RULE.fullmatch(row[1])]
    for index, (number, line, bullet) in enumerate(numbered):
        if not line:
            paragraph += not fresh
            fresh = True
            continue
        unnumbered = _ITEM.sub("", line, count=1) if _ITEM.match(line) else line
        if (head := HEADING.match(f"{unnumbered}:")) and section_of(head[1], True) is not None:
            line = unnumbered
        bare = line.strip(_DECORATION)
        if (marked := _MARKED_HEADING.match(line)) and section_of(name := marked[1] or marked[2], True) is not None:
            line = f"{name}: {line[marked.end() :]}".strip()
        elif section_of(bare, True) is not None or is_not_drafted(bare, marked=False):
            line = f"{bare}:"
        before = lines[-1][2] if lines else ""
        starts = bullet or bool(_LABEL.match(line) or _ITEM.match(line))
        begins = section_of(before.rstrip(" :："), True) is not None
        heads = before.endswith((":", "：", "?", "？")) and not begins
        small = line[0].islower()
        listed = small and _begins_in_lower_case(before) and (listed or not _STOP.search(f"{previous} {line}"))
        wrapped = (small and not listed) or len(previous) >= _WRAPPED or _is_cut(before, line)
        previous = line
        if (before and not fresh and not starts and (heads or (wrapped and not ends_sentence(before)))) or (
            before and heads and not _LABEL.match(line)
        ):
            lines[-1] = (*lines[-1][:2], f"{before} {line}")
        else:
            after = [text for _, text, _ in numbered[index + 1 : index + 3]]
            near = bool(after and after[0])
            answer = next(filter(None, after), "")
            answered = _is_statement(answer if near else answer.partition(" ")[0]) and not answer[0].islower()
            separate = fresh or begins or heads or line.isupper() or _is_statement(before)
            if answered and separate and _is_title(title := _FRAME.sub("", line), answer):
                line = f"{title}:"
            lines.append((number, paragraph, line))
        fresh = False
    return lines


def _clean(raw: str) -> tuple[str, bool]:
    """A line without its bullet and with single spaces, and whether it had a bullet."""
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in _BULLET.sub("", raw))
    return _UNMARKED_HEADING.sub(r"\1: ", " ".join(line.split())), bool(_BULLET.match(raw))


def _is_statement(line: str) -> bool:
    """Whether a line is a sentence, ends with a sign (``-``) or has a word such as ``normal``: no heading does."""
    words = re.findall(r"\w+", line.casefold())
    return ends_sentence(line) or not WORDS["stating"].isdisjoint(words) or bool(re.search(r"(^|\s)[^\w\s]+$", line))


def _last_sentence(line: str) -> str:
    """The last sentence of a line, without the heading of a section."""
    last = (split_text(line) or [""])[-1]
    heading = HEADING.match(last)
    return last[heading.end() :] if heading and section_of(heading[1], True) is not None else last


def _begins_in_lower_case(line: str) -> bool:
    return _last_sentence(line)[:1].islower()


def _is_cut(line: str, following: str) -> bool:
    """Whether a sentence cannot end at the end of a line, or the next line cannot begin one."""
    words = re.findall(r"\w+|[^\w\s]", _last_sentence(line).casefold())
    open_words = WORDS["linking"] | WORDS["determining"] | {","}
    if words and words[-1] in ("no", "not", "non"):  # may be an answer
        return len(words) == 1 or words[-2] in open_words
    return bool(words) and (words[-1] in open_words or following.partition(" ")[0] in WORDS["linking"])


def _is_title(line: str, answer: str) -> bool:
    """Whether a line before an answer is a heading without a colon: short, without punctuation or a statement."""
    short = _TITLE.fullmatch(line) and len(line.split()) <= _TITLE_WORDS and ends_sentence(f"{line}.")
    return bool(short) and not _is_cut(line, answer) and not _is_statement(line) and not _LABEL.match(answer)


def section_of(name: str, has_findings: bool) -> int | None:
    """The section that a heading starts: 0 findings, 1 impression; ``None`` for other text.

    The parts of ``CONCLUSION/PLAN`` or ``FINDINGS AND IMPRESSION`` are headings each, and the first section counts;
    adjectives, text in brackets and decoration do not.
    """
    words = " ".join(_BRACKETS.sub("", _fold(name)).strip(_DECORATION).split())
    if words in WORDS["findings_or_impression"]:
        return int(has_findings)
    parts = [_without_adjectives(part) for part in re.split(r" ?[/&] ?| and ", words)]
    known = [section for part in parts for section, of in enumerate(("findings", "impression")) if part in WORDS[of]]
    return min(known) if known and len(known) == len(parts) else None


def _fold(heading: str) -> str:
    """A heading for comparison: full-width letters are ordinary ones, capitals are small."""
    return unicodedata.normalize("NFKC", heading).casefold()


def _without_adjectives(part: str) -> str:
    words = part.split()
    while len(words) > 1 and words[0] in WORDS["adjectives"] and part not in WORDS["impression"]:
        part = " ".join(words := words[1:])
    return part


def is_not_drafted(heading: str, marked: bool = True) -> bool:
    """Whether a heading starts what is true of one study only, such as ``INDICATION``.

    Args:
        heading: the heading.
        marked: whether a colon follows; without one, all its words must be known.
    """
    words = re.findall(r"\w+", _BRACKETS.sub("", _fold(heading)))
    known = bool(words) and WORDS["not_drafted"].issuperset(words)
    return known or (marked and bool(_NOT_DRAFTED.fullmatch(" ".join(words))))
