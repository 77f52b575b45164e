"""What an English sentence says, by its words: which abnormalities it states, and which findings it is about.

A normal sentence denies a finding in endless ways (``Both lungs are free.``, ``CTR 48%.``), so beside image findings a
template's sentence is kept only if it is understood: it states one of them, or is about something else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from functools import cache

from cbedge.findings.image_findings import OTHER


def _both(one: str, other: str, between: str = ".*") -> str:
    """A pattern of two words in any order."""
    return rf"({one})\b{between}\b({other})|({other})\b{between}\b({one})"


_FEW_WORDS = r"\s+(\w+\s+){0,3}"
# finding that only some image heads score → words that state it; together they state "other abnormality"
_RARE = {
    "nodule": r"nodul\w+|mass(es)?|malignan\w+|metasta\w+|tumou?rs?|cancer|carcinoma|lesions?",
    "pneumothorax": r"(hydro-?)?pneumothora\w+",
    "hernia": r"hernia\w*",
    "pleural thickening": r"thicken\w+",
    "calcification": r"granulom\w+|calcifi\w+",
    "spine": r"scoliosis|degenerative",
    "cavity": r"tuberculosis|cavit\w+",
    "lymphadenopathy": r"\w*adenopathy",
}
# finding of an image head → words that state it; findings without a score are "other abnormality"
_STATED = {
    "cardiomegaly": r"cardiomegaly|" + _both(r"hearts?|cardi\w+|ctr", r"enlarge\w+|big|large|dilated|increased"),
    "effusion": r"effusions?|h(ydro|a?emo)-?thora\w+|blunt(ed|ing)|pleural (fluid|collections?)",
    "atelectasis": r"atelecta\w+|(?<!vertebral )(?<!body )collapse\w*|volume loss|loss of volume",
    "opacity": r"opaci\w+|consolidat\w+|infiltrat\w+|(broncho)?pneumoni[ac]|shadowing|air-?\s?space disease|"
    r"ggo|infect\w+",
    "hyperinflation": r"hyper-?inflat\w+|hyper-?expan\w+|emphysem\w+|copd|air[\s-]trapping|"
    + _both(r"diaphragms?|hemi-?diaphragms?", r"flat\w*"),
    "low volume": r"hypo-?(inflat|expan|ventilat)\w+|"
    + _both(r"volumes?|inspirat\w+|inflat\w+", r"low|reduced|small|decreased|diminished|poor|shallow", _FEW_WORDS),
    "aorta": r"tortu\w+|unfold\w+|ecta(tic|sia)|aneurysm\w*|athero\w+",
    "scar": r"scar\w*|fibro(sis|tic)|sequela\w*",
    "device": r"pacemakers?|catheters?|sternotomy|stents?|endotracheal|tubes?(?! (voltage|current))|drains?|picc|cvc|"
    r"(sternal|surgical) (wires|clips)|implant\w*|prosthe\w+|art[ei]facts?",
    "congestion": r"congest\w+|o?edema|(heart|cardiac|ventricular) failure|chf|decompensat\w+|cephali[sz]ation|kerley|"
    r"(fluid|volume) overload|redistribution|upper lobe (blood )?diversion",
    "fracture": r"fractur\w+|broken",
    OTHER: "|".join(_RARE.values()),
}
_LUNGS = r"(?<!no )lungs?(?! (volumes?|markings))|parenchym\w+|air-?\s?spaces?|alveol\w+"
_VOLUME = r"volumes?|\w*inflat\w+|\w*expan\w+|aeration|inspirat\w+|ventilation"
# finding → words of what it changes, besides those that state it
_SUBJECTS = {
    "cardiomegaly": r"hearts?|ht|cor|cardiac(?! (device|pacemaker|lead|monitor|valve|surg)\w*)|c/?t\W? ?r(atio)?|cms|"
    r"cardio\w+|cardio-?\s?(thoracic|mediastin\w+|pericard\w+|vascular|pulmonary)|ventric\w+|pericardi\w+",
    "effusion": r"pleura\w*|cost?o-?\s?(phrenic|diaphragmatic)|costophr\w*|angles?|c/?pa?s?|sulc(i|us)|recess(es)?|"
    r"sinus(es)?|fluid",
    "atelectasis": rf"{_LUNGS}|\w*expan\w+|aerat\w+|plate-?like",
    "opacity": rf"{_LUNGS}|inflammat\w+|translucency|transparency|lucency",
    "hyperinflation": rf"{_VOLUME}|(hemi-?)?diaphragms?(?=.*\b(level|height|position)\b)",
    "low volume": _VOLUME,
    "aorta": r"aort\w+|(great|large|mediastinal|thoracic) vessels",
    "scar": rf"{_LUNGS}|interstiti\w+|ild|residu\w+|chronic|old|apical thickening|pleural thickening",
    "device": r"devices?|(?<!pleural )(?<!kerley )(?<!paraspinal )(?<!septal )lines?|hardware|apparatus|"
    r"foreign bod(y|ies)|wires?|clips|leads|icds?|ports?|metal\w*|art[ei]facts?|valves?|instrument\w*|ett|ngt?|lvad",
    "congestion": rf"{_LUNGS}|\w*vascula\w+|vessels?|veins?|venous|markings|stasis|failure|interstiti\w+",
    "fracture": r"bon[ey]\w*|osseous|skelet\w+|ribs?|clavicl\w+|spine|spinal|vertebra\w*|musculo-?skeletal|"
    r"msk|scapula\w*|thoracic (cage|wall)|chest wall|trauma\w*|injur\w+|sternum",
}
# Words of what no finding changes.
_ELSEWHERE = (
    r"mediastin\w+|hil(um|a|ar|i)|trachea\w*|airways?|carina|bronch\w+|soft|tissues?|abdom\w+|free (air|gas)|"
    r"subphrenic|(hemi-?)?diaphragm\w*|thymus|thyroid|o?esophag\w+|stomach|gastric|breasts?|neck|axilla\w*|fissures?|"
    r"apex|apices|ha?emorrhage|lymph\w*|rotat\w+|comparison|priors?|previous|interval|patient|quality|technique|technical\w*|"
    r"projection|exposure|penetrat\w+|views?|follow-?\s?up|thymic|shoulders?|joints?|arthr\w+|follow|correlat\w+"
)
_ACUTE = re.compile(r"\b(acute|active)\b", re.IGNORECASE)
_ACUTE_FINDINGS = frozenset({"effusion", "opacity", "congestion"})
# Words of an opacity, if they name nothing else.
_FOCAL = r"focal|densit\w+|shadows?|patch\w*|process\w*|lobes?|zones?|bases?|markings|pneumoni\w+"


_CHEST = (
    r"cardio-?\s?(pulmonary|respiratory)|intra-?thoracic|chest(?! wall)|thorax|hemi-?thora\w+|"
    r"thoracic (disease|process\w*|abnormalit\w+|findings?|patholog\w+)"
)
# finding that is part of another one → words that state it
_PARTS = {
    "consolidation": r"consolidat\w+|(broncho)?pneumoni[ac]|air-?\s?space disease",
    "edema": r"o?edema|kerley|(heart|cardiac|ventricular) failure|chf|decompensat\w+|(fluid|volume) overload",
}
_PLEURA = r"pleura|pleural (spaces?|surfaces?|margins?|cavit\w+|abnormalit\w+|disease|changes?)"
# finding → words of what it changes, for those that only some image heads score or that are part of another one; and
# further words that matter for what is not assessed
_FURTHER_SUBJECTS = {
    "cardiomegaly": rf"{_SUBJECTS['cardiomegaly']}|silhouettes?|atri(um|al|a)",
    "nodule": rf"{_LUNGS}|focal|densit\w+|neoplas\w+",
    "pneumothorax": rf"{_LUNGS}|{_PLEURA}|apices|apex|fully expanded",
    "hernia": r"hiat\w+|retrocardiac|stomach|gastric|(hemi-?)?diaphragm\w*",
    "pleural thickening": rf"{_PLEURA}|apices|apex|apical|cost?o-?\s?(phrenic|diaphragmatic)|sulc(i|us)|angles?",
    "calcification": rf"{_LUNGS}|hil(um|a|ar|i)",
    "spine": r"spine|spinal|vertebra\w*|bon[ey]\w*|osseous|skelet\w+|kypho\w+|spondyl\w+|osteophyt\w+|dis[ck]s?",
    "consolidation": rf"{_LUNGS}|infiltrat\w+|opaci\w+|infect\w+|inflammat\w+|focal",
    "edema": rf"{_LUNGS}|\w*vascula\w+|interstiti\w+|congest\w+",
}


_VERBS = r"is|are|was|were|be|been|has|have|had|may|can|could|does|do|did|appears?|appeared|remains?|shows?|reveals?"
# Words that say something of what is named.
_SAYS = rf"{_VERBS}|stable|unchanged|mild|moderate|minimal|borderline|prominent|seen|noted|visible|identified|present"
# Words that name nothing: a sentence that denies something and has another unknown word may deny what that word names.
_NEUTRAL = re.compile(
    rf"{_VERBS}|the|an?|and|or|but|nor|of|in|on|to|at|for|with|by|as|from|under|than|that|this|these|which|there|its?|any|"
    r"both|seen|identified|visible|visuali[sz]ed|noted|demonstrated|evident|present|found|shown|appearing|given|evidence|"
    r"acute|active|definite(ly)?|gross(ly)?|large|small|mild(ly)?|minimal(ly)?|moderate(ly)?|significant(ly)?|obvious|overt|"
    r"convincing|suspicious|suspected|typical|stable|unchanged|well|specific(ally)?|radiographic(ally)?|overall|right|left|"
    r"bilateral(ly)?|upper|lower|middle|mid|medial|lateral|central(ly)?|anterior|posterior|superior|inferior|top|borderline|"
    r"sized?|contours?|limits?|configuration|appearance|structures?|areas?|spaces?|calib(er|re)|position|width|shape|"
    r"findings?|abnormalit(y|ies)|abnormal|changes?|disease|process(es)?|xx+|age|pulmonary|cardiac|thoracic|frank|visuali[sz]ation",
    re.IGNORECASE,
)
_CALLED_NORMAL = r"normal|unremarkable|negative|healthy|satisfactory|clear"
_WHOLE_STUDY = r"views?|projections?|patients?|follow-?\s?up"
# Words of a sentence that speaks of everything.
_GENERAL = re.compile(
    r"\b(everything|anything|all else|otherwise|else|remainder|remaining|rest|elsewhere)\b|"
    rf"\b({_CALLED_NORMAL})\b(\s+[\w-]+){{0,4}}\s+({_WHOLE_STUDY})\b|\b({_WHOLE_STUDY})\s+(is|are|appears?)\s+(\w+\s+)?({_CALLED_NORMAL})\b",
    re.IGNORECASE,
)
_ABOUT = {name: f"{words}|{_STATED[name]}" for name, words in {**_SUBJECTS, OTHER: _ELSEWHERE}.items()}
# Everything that a sentence can be about, by words that are known here.
_SUBJECT_WORDS = "|".join([*_ABOUT.values(), *_FURTHER_SUBJECTS.values(), *_PARTS.values(), _CHEST])
# What is behind these is denied, and what is before them is not.
_DENIED_BEHIND = re.compile(r"\b(without|(but|and|with) no|no longer)\b.*", re.IGNORECASE)
_ABSENT = (
    r"no(?!\.\s?\d)|not|without|negative|free|absent|absence|none|nil|neither|nor|nothing|excluded|unlikely|neg|n|\w+n['’]t)\b|"
    r"[:=–-]\s*([–−-]|0|n|n/a)\W*$|\s(0|[–−-])\W*$|\([–−-]\)"
)
_DENIES_PRESENCE = re.compile(rf"\b({_ABSENT}", re.IGNORECASE)
_DENIES = re.compile(
    r"\b(normal|normally|clear|unremarkable|intact|within|wnl|nad|sharp|satisfactory|nl|ok|healthy|fine|clean|"
    rf"preserved|maintained|{_ABSENT}",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\b(advi[sc]\w+|recommend\w*|suggest\w*|correlat\w+|follow-?\s?up|repeat\w*|compar\w+)\b", re.IGNORECASE
)


@cache
def _words(pattern: str) -> re.Pattern[str]:
    """Compiled when needed: a draft without a user's template needs few of them."""
    return re.compile(rf"\b({pattern})\b", re.IGNORECASE)


def _named(patterns: Mapping[str, str], text: str) -> list[str]:
    """The findings whose words a text has."""
    return [name for name, pattern in patterns.items() if _words(pattern).search(text)]


def stated_by(sentence: str) -> list[str]:
    """The findings that an English sentence states; :data:`OTHER` stands for those without a score of their own."""
    stated = _DENIED_BEHIND.sub("", unicodedata.normalize("NFKC", sentence))
    return [] if _DENIES.search(stated) else _named(_STATED, stated)


def denied_by(sentence: str, present: Collection[str]) -> list[str] | None:
    """The findings present that an English sentence is about and does not state. ``None`` if the sentence denies
    something, but its words do not tell what; that says nothing of devices."""
    text = unicodedata.normalize("NFKC", sentence)
    if stated_by(text) or (not {*present} - {"device"} and not _words(_ABOUT["device"]).search(text)):
        return []
    if _ACUTE.search(text) and not _words(_SUBJECTS["fracture"]).search(text):
        return [name for name in present if name in _ACUTE_FINDINGS]
    about = _named(_ABOUT, text) or ["opacity"] * bool(_words(_FOCAL).search(text))
    if not about:
        return None if _DENIES.search(text) else []
    affirmed = {OTHER, *["device"] * (not _DENIES_PRESENCE.search(text)), *["fracture"] * (not _DENIES.search(text))}
    return [name for name in present if name in about and name not in affirmed]


def understood(sentence: str, present: Collection[str]) -> bool:
    """Whether an English sentence is understood to agree with the findings present, of which it states no other: it
    states one, denies something else, or advises something."""
    if stated := stated_by(sentence):
        return {*stated} <= {*present} - {OTHER}
    return denied_by(sentence, present) == [] if _DENIES.search(sentence) else bool(_ADVICE.search(sentence))


def agrees(sentence: str, present: Collection[str]) -> bool:
    """Whether an English sentence of an impression can be understood, by its words, to agree with the findings present:
    it states one of them, speaks of other ones only, or advises something."""
    sentence = unicodedata.normalize("NFKC", sentence)
    named = {*_named(_STATED, sentence)}
    if named.isdisjoint(present):
        return bool(named) or bool(_ADVICE.search(sentence) and not _DENIES.search(sentence))
    return not named.isdisjoint(stated_by(sentence))


def unscored(scored: Collection[str]) -> tuple[str, ...]:
    """The findings of which sentences speak and that are not among the scored ones."""
    return tuple(name for name in {**_SUBJECTS, **_RARE, **_PARTS} if name not in scored)


def may_concern(sentence: str, finding: str) -> bool:
    """Whether an English sentence may state or deny a finding: it has words that state it; or it states nothing else
    and has words of what the finding changes, or denies something acute, of the whole chest, or not told by its words.
    A finding that is not known here has the words of its name. In case of doubt it may."""
    text = unicodedata.normalize("NFKC", sentence)
    words = {**_STATED, **_RARE, **_PARTS}.get(finding, re.escape(finding))
    if _words(words).search(text):
        return True
    if stated_by(text):
        return False
    subjects = {**_SUBJECTS, **_FURTHER_SUBJECTS}.get(finding)
    if subjects is not None and _words(subjects).search(text):
        return True
    if _GENERAL.search(text):
        return True
    if not _DENIES.search(text):
        return False
    if (_ACUTE.search(text) and not _words(_SUBJECTS["fracture"]).search(text)) or _words(_CHEST).search(text):
        return True
    rest, named = _words(_SUBJECT_WORDS).subn(" ", text)
    return not named or bool(_unknown_words(rest))


def is_fragment(sentence: str) -> bool:
    """Whether an English sentence names things and says nothing of them: ``Heart size and pulmonary vascularity.``"""
    text = unicodedata.normalize("NFKC", sentence)
    if _DENIES.search(text) or _words(_SAYS).search(text) or _named(_STATED, text):
        return False
    rest, named = _words(_SUBJECT_WORDS).subn(" ", text)
    return bool(named) and not _unknown_words(rest)


def _unknown_words(text: str) -> list[str]:
    """Words of two or more letters that name something not known here, or may do so."""
    words = re.findall(r"[^\W\d_]{2,}", _DENIES.sub(" ", text))
    return [word for word in words if not _NEUTRAL.fullmatch(word)]
