"""Checks of a template's text: what is no normal report and what must not be copied into a draft."""

from __future__ import annotations

import re

from cbedge.drafting.template_text import section_of
from cbedge.errors import ContextError
from cbedge.prompt import SPECIAL_TOKEN

_STATE = (
    r"(?:normal|abnormal|unremarkable|clear|sharp|blunted|intact|enlarged|increased|decreased|dilated|widened|none|no|"
    r"yes|not|with|without|absent|present|mild|mildly|moderate|severe|small|large|is|are|shows?)"
)
_BLANK = re.compile(
    r"_{2,}|X{3,}|\*{2,}|\.{3,}|…|\?{2,}|\[[^\]\n]*\]|<[A-Za-z][^<>|\n]{0,40}>|\$?\{+[^{}\n]*\}+|\$\w[^$\n]{0,40}\$|"
    rf"%\w+%|@\w+@|[☐☑☒□▢◻⬜○◯◉✓✔✕✖✗✘✅❌❎]|\([xX]?\s*\)|"
    rf"^\s*(?-i:[xo] +(?=[A-Z]))|\b{_STATE}\s*/\s*{_STATE}\b|\b(?:normal|clear|none?)/[^\W\d_]+\b(?!\s*:)",
    re.IGNORECASE | re.MULTILINE,
)
_FORMATS = {
    "RTF": re.compile(r"\\rtf\d?|\\par\b"),
    "HTML": re.compile(r"</\w+>|<(?:p|br|b|i|u|div|span|html|li|ul|table)\b[^<>]*>|&(?:[a-z]{2,8}|#x?\w+);", re.I),
    "JSON": re.compile(r'^\s*[{\[]\s*["{\[\]}]|"\w+"\s*:'),
    "CSV": re.compile(r'^"?\w+"?[,;]"|^\w+([,;])\w+(?:\1\w+)*\s*\n\w+\1', re.MULTILINE),
    "a table": re.compile(r"(?<!<)\|(?!>)|\S\t+\S+\t+\S"),
    "a comment": re.compile(r"^\s*(?://|/\*|;)", re.MULTILINE),
    "an escape sequence": re.compile(r"\\\S{0,4}"),
}
_FILE_NAME = re.compile(
    r"[^\n]*\.(?:txt|text|md|docx?|odt|rtf|pdf|html?|json|ya?ml|csv|xml|dcm)|(?:~|\.{0,2}/|[A-Za-z]:[\\/])[^\n]*|"
    r"[^\s\u2e80-\uffff]*"
)
_SIGNED = (
    "(?:signed|authenticated|dictated|transcribed|typed|reported|interpreted|approved|verified|finali[sz]ed|reviewed|"
    "read)"
)
_MONTH = (
    "(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?)"
)
# What holds for one study or person only: how it is called, and how a sentence with it looks.
_PRIVATE = {
    "a signature": (
        r"(?:^|\s)/s/",
        rf"\b(?:electronically|digitally) {_SIGNED}\b",
        rf"^(?:signed|signature|{_SIGNED} ?(?:by\b|:))",
        r"^(?:(?:attending|reporting|staff) )?(?:radiologist|physician|consultant|resident)(?: name)?\s*[:.,]",
        r"^(?:gez\.|unterzeichnet|diktiert|befundet von|signé|dicté|firmado|dictado|firmato|assinado)(?!\w)",
        r"^(?:dr|prof)\.? \w",
        r"^(?:(?:with )?(?:kind|best|warm) regards|(?:yours )?(?:sincerely|faithfully)|mit freundlichen grüßen)\b",
        r"\b(?-i:M\.?D|FRCR|MBBS|FACR|FRANZCR)\b\W*$",
    ),
    "patient data": (
        r"^(?:patient|patientin|paciente|paziente|pt|name|nombre|nom|age|sex|gender|geb|address)(?:'?s)?"
        r"(?: (?:name|id|no|number|age|sex))?\.?\s*[:：#]",
        r"^(?:referring|ordering|requesting) \w+\s*[:：]",
        r"(?-i:\b(?:Mr|Mrs|Ms|Herr|Frau)\.? [A-Z])",
        r"\b(?:MRN|DOB|SSN|accession|acc ?#|acc(?= no\b)|date of birth|medical record|geburtsdatum)(?!\w)",
        r"(?<![\d.,])\b\d{1,3}[- ]?(?:years?[- ]old|yrs?|yo?|y/o)\b(?!\.? (?:ago|earlier|before))",
    ),
    "a communication": (
        r"\b(?:discussed|reviewed) (?:with|by|on|at|in person)\b",
        r"\b(?:communicated|conveyed|notified|informed|paged|(?:tele)?phoned?|faxed|e-?mailed|telefonisch|mitgeteilt)\b",
        r"\bcalled (?:to|in|by|at)\b",
        r"^(?:thank(?:s| you)|many thanks|dear|vielen dank|merci|gracias)\b",
    ),
    "a name": (r"(?-i:\b(?:D[Rr]|P[Rr](?:of|OF))\.? [A-Z])", r"\b(?:by|to|with|from) (?-i:(?:[A-Z]\. ?)+[A-Z]\w+)"),
    "a place": (r"\b(?:room|ward|bed|bay|cubicle|zimmer|station|bett)(?: no\.?| ?#)? ?\d",),
    "a time of day": (r"\b(?:[01]?\d|2[0-3]):[0-5]\d\b", r"\b\d{1,2} ?(?:[ap]\.?m\b|uhr\b|hrs\b)"),
    "a date": (
        r"\b\d{1,2}([/.-])\d{1,2}\1\d{2,4}\b",
        r"\b\d{4}-\d{1,2}-\d{1,2}\b",
        rf"\b{_MONTH}\.? (?:\d{{1,2}}(?:st|nd|rd|th)?,? )?\d{{4}}\b",
    ),
    "an identifier or an address": (r"\d{6}", r"\b\d{3}[- ]\d{4}\b", r"\S@\S", "https?:"),
}
_PRIVATE_PATTERNS = {kind: [re.compile(p, re.IGNORECASE) for p in patterns] for kind, patterns in _PRIVATE.items()}


def private_content(sentence: str) -> str | None:
    """What a sentence looks like that holds for one study or person only, such as ``a signature``; else ``None``."""
    return next((kind for kind, found in _PRIVATE_PATTERNS.items() if any(p.search(sentence) for p in found)), None)


def refuse_what_is_no_report(text: str) -> None:
    """Refuse a file name, another format than plain text, and what is left to fill in or to choose."""
    if _FILE_NAME.fullmatch(text.strip()) and re.search(r"\w", text) and not text.endswith((".", ":")):
        raise ContextError("the template is a file name or a single word: give the text of a normal report")
    for name, pattern in _FORMATS.items():
        if found := pattern.search(text):
            quoted = " ".join(found.group().split())[:20]
            raise ContextError(
                f"the template has {name} ({quoted}): give the sentences of a normal report as plain text"
            )
    for blank in _BLANK.finditer(text):
        if SPECIAL_TOKEN.fullmatch(blank.group()) and blank.group().startswith("["):
            continue
        quoted = blank.group().strip()[:20]
        if section_of(blank.group().strip("[] "), True) is None:
            raise ContextError(f"the template has a blank to fill in ({quoted}): fill it in, or remove the sentence")
