"""The language of a template: contradictions to image findings can be detected in English only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from cbedge.errors import ContextError

# Frequent words of English reports that German, French, Spanish and Italian ones do not have.
_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        "findings the is are and of with without within there not or in on for to seen has have been be by clear "
        "intact unremarkable heart lungs lung size limits evidence acute chest ribs bones bony osseous spine pleural "
        "effusion effusions disease soft tissues tissue film view views abnormality both appear appears free normally "
        "well cardiac silhouette contours structures hila mediastinum airspace cardiomediastinal sharp angles trachea "
        "pulmonary vascularity costophrenic recesses cardiomediastinum parenchyma skeleton radiograph opacity "
        "opacities masses vessels thoracic hilar aortic diaphragm nad wnl appearances any change changes collapse "
        "device devices enlarged expanded fracture fractures inflated lesion lines loss low lobe lobes old scarring "
        "tubes volumes outline shadow nothing",
    )
)
# Words of languages in which "no" is a word too; without one of them, "no" is taken as English.
_ROMANCE = frozenset(
    re.findall(
        r"\w+",
        "se hay de del la el lo los las les sin con y il gli di e non nel da do sem com derrame corazon corazón "
        "pulmones cuore polmoni versamento coração pulmões",
    )
)
_ENGLISH_SHARE = 0.25


def is_english(sentences: Iterable[str]) -> bool:
    """Whether sentences are English, by their share of frequent English words."""
    words = re.findall(r"[^\W\d_]+", " ".join(sentences).lower())
    english = _ENGLISH | {"no"} if _ROMANCE.isdisjoint(words) else _ENGLISH
    return sum(word in english for word in words) >= _ENGLISH_SHARE * max(1, len(words))


def refuse_other_script(sentences: Iterable[str]) -> None:
    """Check that a template is written from left to right with an alphabet, so that drafts can follow it.

    Raises:
        ContextError: most letters are of another script, such as Arabic, Hebrew or Chinese.
    """
    alphabets = [unicodedata.name(c, "").partition(" ")[0] for c in "".join(sentences) if c.isalpha()]
    known = sum(name in ("LATIN", "GREEK", "CYRILLIC") for name in alphabets)
    if 2 * known < len(alphabets):
        raise ContextError(
            "the template is in another language, whose script drafts do not support: give a normal report in English "
            "or in another language with Latin letters"
        )
