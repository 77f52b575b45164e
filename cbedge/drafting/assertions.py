"""Sentences of a template that state an abnormality, which a normal report does not: found by words, in English."""

from __future__ import annotations

import re
from collections.abc import Collection

from cbedge.findings.image_findings import OTHER

# finding of an image head → words that state it; findings without a score are "other abnormality"
_STATED = {
    "cardiomegaly": r"cardiomegaly|(heart|cardi\w+)\b.*\benlarge\w+|enlarge\w+\b.*\b(heart|cardiac)",
    "effusion": r"effusions?|hydro-?thorax|blunt(ed|ing)",
    "atelectasis": r"atelecta\w+|(?<!vertebral )(?<!body )collapse\w*|volume loss",
    "opacity": r"opaci\w+|consolidat\w+|infiltrat\w+|(broncho)?pneumonia|shadowing|air-?\s?space disease",
    "hyperinflation": r"hyper-?inflat\w+|hyper-?expan\w+|emphysem\w+",
    "low volume": r"(low|reduced|small)( lung)? volumes|poor inspiration",
    "aorta": r"tortuous|unfolded|ectatic|aneurysm\w*|atheroscler\w+",
    "scar": r"scar\w*|fibro(sis|tic)",
    "device": r"pacemakers?|catheters?|sternotomy|stents?|endotracheal|tubes?",
    "congestion": r"congest\w+|o?edema|heart failure|decompensat\w+",
    "fracture": r"fractur\w+",
    OTHER: r"nodul\w+|mass(es)?|pneumothora\w+|hernia\w*|malignan\w+|metasta\w+|tumou?rs?|cancer|carcinoma|"
    r"tuberculosis|cavit\w+|lesions?|thicken\w+|scoliosis|degenerative|granulom\w+|calcifi\w+|\w*adenopathy",
}
_PATTERNS = {name: re.compile(rf"\b({words})\b", re.IGNORECASE) for name, words in _STATED.items()}
# What is behind these is denied, and what is before them is not.
_DENIED_BEHIND = re.compile(r"\b(without|(but|and|with) no|no longer)\b.*", re.IGNORECASE)
_DENIES = re.compile(
    r"\b(no|not|without|normal|normally|clear|unremarkable|intact|negative|free|within|wnl|nad|sharp|absent|absence|"
    r"none|nil|neither|nor|nothing|excluded|unlikely|satisfactory|neg|nl|n|ok|\w+n['’]t)\b|"
    r"[:=–-]\s*([–−-]|0|n|n/a)\W*$|\s(0|[–−-])\W*$|\([–−-]\)",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\b(advi[sc]\w+|recommend\w*|suggest\w*|correlat\w+|follow-?\s?up|repeat\w*|compar\w+)\b", re.IGNORECASE
)


def stated_by(sentence: str) -> list[str]:
    """The findings that an English sentence states; :data:`OTHER` stands for those without a score of their own."""
    stated = _DENIED_BEHIND.sub("", sentence)
    if _DENIES.search(stated):
        return []
    return [name for name, pattern in _PATTERNS.items() if pattern.search(stated)]


def agrees(sentence: str, present: Collection[str]) -> bool:
    """Whether an English sentence of an impression can be understood, by its words, to agree with the findings present:
    it states one of them, speaks of other ones only, or advises something."""
    named = {name for name, pattern in _PATTERNS.items() if pattern.search(sentence)}
    if named.isdisjoint(present):
        return bool(named) or bool(_ADVICE.search(sentence) and not _DENIES.search(sentence))
    return not named.isdisjoint(stated_by(sentence))
