"""The lines of a template's text, and the headings in them."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

from cbedge.sentences import ends_sentence

WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words)
    for name, words in json.loads(Path(__file__).with_name("template_words.json").read_text(encoding="utf-8")).items()
}
"""Headings of several languages by meaning (``findings``, ``impression``, ``findings_or_impression``, which depends on
the place, and ``not_drafted``, which start what is true of one study only); and ``english``, frequent words of English
reports that German, French, Spanish and Italian ones do not have. All in lower case."""

_NAME = r"([^\W\d_][^\W\d_]*(?: (?:and|&|des|en)? ?[^\W\d_]+){0,2})"
HEADING = re.compile(rf"{_NAME}\.?\s*[:：]\s*")
_MARKED_HEADING = re.compile(rf"(?:\[\s*{_NAME}\s*\]\s*[:：]?|{_NAME}\s*[-–—](?=\s|$))\s*")  # without a colon
_LABEL = re.compile(r"[^\W\d_][\w /&(),-]{0,40}\.?[:：](?=\s|$)")
_ITEM = re.compile(r"\(?(?:\d{1,2}|[IVXivx]{1,4})[.)]\s")
_BULLET = re.compile(r"^\s*[-*•·‣◦▪–—#]+\s+")
_WRAPPED = 50  # characters: a line at least this long without a full stop continues in the next line


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines of a text, each with its number from 1: white space normalized, bullets removed, wrapped sentences
    joined."""
    lines: list[tuple[int, str]] = []
    fresh = True
    for number, raw in enumerate(text.splitlines(), 1):
        bullet = bool(_BULLET.match(raw))
        line = _BULLET.sub("", raw)
        line = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in line)
        line = re.sub(r"\s+", " ", line).strip()
        if not line:
            fresh = True
            continue
        if (marked := _MARKED_HEADING.match(line)) and section_of(name := marked[1] or marked[2], True) is not None:
            line = f"{name}: {line[marked.end() :]}".strip()
        elif is_not_drafted(line.rstrip(" .:：")):
            line = f"{line.rstrip(' .:：')}:"
        before = lines[-1][1] if lines else ""
        starts = bullet or bool(_LABEL.match(line) or _ITEM.match(line)) or section_of(line, True) is not None
        heads = before.endswith((":", "："))
        wrapped = line[0].islower() or len(before) >= _WRAPPED
        if (before and not fresh and not starts and (heads or (wrapped and not ends_sentence(before)))) or (
            before and heads and not _LABEL.match(line) and section_of(before.rstrip(" :："), True) is None
        ):
            lines[-1] = (lines[-1][0], f"{before} {line}")
        else:
            lines.append((number, line))
        fresh = False
    return lines


def section_of(name: str, has_findings: bool) -> int | None:
    """The section that a heading starts: 0 findings, 1 impression; ``None`` for other text."""
    words = " ".join(name.casefold().split())
    if words in WORDS["findings_or_impression"]:
        return int(has_findings)
    if words in WORDS["findings"] or words in ("findings and impression", "findings & impression"):
        return 0
    return 1 if words in WORDS["impression"] else None


def is_not_drafted(heading: str) -> bool:
    """Whether a heading starts what is true of one study only, such as ``INDICATION``."""
    return heading.casefold() in WORDS["not_drafted"]
