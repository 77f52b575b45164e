"""The language of each sentence of a template: contradictions to image findings can be detected in English only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

from cbedge.errors import ContextError

# Regular expressions of words that English reports have, and reports in the languages below have not; and of words that
# reports in these languages have, and English ones have not.
_ENGLISH = (
    r"no|the|are|of|and|with|without|there|not|for|to|seen|has|have|been|be|by|both|any|this|that|from|show|shown|"
    r"none|nothing|nil|neither|normally|wnl|nad|clear(ly)?|intact|unremarkable|appears?|appearances?|hearts?|lungs?|"
    r"sized?|limits?|evidence|chest|ribs?|bon[ey]\w*|osseous|spine|tissues?|views?|disease|abnormalit\w+|changes?|"
    r"cardiac|silhouette|contours?|airspaces?|sharp|angles?|pulmonary|vascularity|costophrenic|skeleton|radiograph|"
    r"findings|opacit(y|ies)|vessels?|thoracic|hilar|aortic|devices?|enlarge\w*|expanded|inflated|fractures?|loss|"
    r"lobes?|scar(ring|s)?|tubes?|low|volumes|shadow\w*|effusions?|airways?|fluid|blood|soft|active|left|right|upper|"
    r"lower|middle|small|mild(ly)?|unchanged|consolidation|infiltrates?|o?edema|failure|atelecta(sis|tic)|"
    r"cardiomegaly|pacemaker|wires?|sternotomy|"
    r"tortuous|thickening|degenerative|calcified|recommended|infection|collapse|patient|below|well|within"
)
_FOREIGN = (
    # German
    r"und|das|kein\w*|mit|ohne|nicht|ist|sind|beid\w+|bei|links\w*|rechts\w*|herz\w*|lungen?|\w*erguss|"
    r"(?!\w*lung)\w{3,}ung(en)?|glatt|befunde?|zwerchfell\w*|rippe\w*|knochen\w*|schlank\w*|normale[nrsm]|hili|"
    r"pulmonale\w*|\w*organe|pneumonie|frei|weichteil\w*|alters\w+|regelrecht\w*|infiltrat|kardio\w+|stauungs\w*|"
    r"atelektas\w+|verbreitert|elongiert|zart|normalbefund|"
    # French
    r"les?|unes?|des?|du|pas|sans|sont|aux?|avec|ni|coeur|cœur|poumons?|pulmonaires?|pleuraux|normaux|"
    r"(thorac|cardia|pleur|aort|hydroaer)iques?|foyers?|anomalies?|culs?|libres|osseu(x|ses?)|cadre|parenchyme|"
    r"radiographie|"
    # Spanish, Italian and Portuguese
    r"hay|del?(la|lo|le|l)?|los|las|sin|con|gli|il|di|dei|nel\w*|nei|non|sem|com|nao|dos|da|uma?|derrames?|"
    r"\w{4,}(cao|coes)|cora[cz]on|coracao|cuore|pulmon(es|ar|ares)|pulmoes|polmon\w*|versament\w*|pleuric\w+|pleurais|"
    r"torac\w+|torax|card[ií]ac[oa]s?|silueta|neumo\w+|\w{3,}(cion|ciones|zion[ei]|[mn]ent[oi])|norma|limiti|"
    r"\w{3,}idad(es)?|infiltrados?|normal(es|i|e)|normais|ose[oa]s?|osse[oai]s?|sen[oi]s?|livres?|liberi|aus[eê]ncia|"
    r"lesion[ei]s|lesoes|fra[ct]turas?|fratture|atele[ct]+asias?|cardiomegalia|mediastin[io]co|mediastino|esame|exame|"
    r"il[io]|polmonite|"
    # Dutch and Swedish
    r"geen|het|een|van|hart|long(en|velden)|niet|zijn|pleuravocht|normaal|afwijking\w*|schoon|slank|scherp\w*|"
    r"sinussen|inga?|inget|och|utan|lungor\w*|lungf\w+|pleurav\w+|normal(t|a|st\w+|fynd)|vidgad\w*|klara|ej|stas|"
    r"skelett\w*|"
    # Polish
    r"bez|nie|serc\w+|pluc\w*|zmian\w*|prawidlow\w*|oraz|klatki|piersiowej|katy|wolne|granicach|normy|ognisk\w*"
)
_WORD = re.compile(r"(?<![-\w])[^\W\d_]{2,}(?![-\w])")  # parts of compounds, such as non-, are no evidence


def are_english(sentences: Sequence[str]) -> list[bool]:
    """Whether each sentence is English: it has more English words than words, or letters, of another language. A
    sentence that has neither is like most others."""
    scores = [_score(sentence) for sentence in sentences]
    most = sum(score > 0 for score in scores) >= sum(score < 0 for score in scores)
    return [score > 0 or (score == 0 and most) for score in scores]


def _score(sentence: str) -> int:
    """Above 0 for an English sentence, below 0 for one in another language, 0 if it is unknown."""
    words = _WORD.findall(unicodedata.normalize("NFKC", sentence).lower())
    english = sum(bool(_compiled(_ENGLISH).fullmatch(word)) for word in words)
    foreign = sum(bool(_compiled(_FOREIGN).fullmatch(word)) or not re.fullmatch("[a-zæœ]+", word) for word in words)
    return english - foreign if english != foreign else -foreign


@cache
def _compiled(words: str) -> re.Pattern[str]:
    """Compiled when needed: only a user's template has to be read."""
    return re.compile(words)


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
