"""Templates: normal reports whose wording a draft follows, sentence by sentence.

Radiologists write most of a report from a template: standard sentences about a normal chest, edited where the image
differs. Which template is used depends on the referrer and the indication more than on the image. So a bundle has a few
templates, and a small linear classifier that selects one from the words of indication and comparison, for studies in
which no abnormality is detected. A user can give a template instead, which is then used for every study. A template's
sentence is used verbatim, or left out because it contradicts an image finding (:mod:`cbedge.drafting.constraints`).

A bundle's template consists of sentences that several training reports share. It states no abnormal finding, and its
findings section is not that of any single report (:mod:`training.templates`).
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.errors import BundleError, ContextError
from cbedge.prompt import SPECIAL_TOKEN, ClinicalContext, build_target, remove_invisible
from cbedge.sentences import ends_sentence, normalize, sentence_spans

BUCKETS = 8192
LENGTHS = (2, 5)  # of the character n-grams, shortest and longest, of words padded with spaces
MAX_TEMPLATE_CHARACTERS = 4000
# Headings that mean FINDINGS or IMPRESSION, in several languages; case-insensitive.
_FINDINGS = frozenset(
    [
        "findings",
        "finding",
        "find",
        "report",
        "description",
        "observations",
        "befund",
        "befunde",
        "constatations",
        "description des images",
        "hallazgos",
        "achados",
        "reperti",
        "referto",
        "bevindingen",
        "beskrivning",
        "описание",
        "所見",
        "所见",
    ]
)
_IMPRESSION = frozenset(
    [
        "impression",
        "impressions",
        "imp",
        "impr",
        "concl",
        "conclusion",
        "conclusions",
        "opinion",
        "comment",
        "comments",
        "summary",
        "interpretation",
        "assessment",
        "diagnosis",
        "beurteilung",
        "zusammenfassung",
        "fazit",
        "en conclusion",
        "conclusión",
        "conclusion diagnostique",
        "impresión",
        "impressão",
        "conclusão",
        "conclusioni",
        "conclusie",
        "bedömning",
        "заключение",
        "印象",
        "結論",
        "结论",
        "診断",
        "诊断",
    ]
)
_RESULT = frozenset(
    ["result", "results", "résultat", "résultats", "ergebnis", "resultado", "risultato"]
)  # either, by its place
# Headings of what is no finding, and true of one study only: it is never drafted.
_NOT_DRAFTED = frozenset(
    [
        "indication",
        "indications",
        "history",
        "clinical history",
        "clinical information",
        "reason for exam",
        "reason for study",
        "technique",
        "comparison",
        "exam",
        "examination",
        "procedure",
        "renseignements cliniques",
        "motif",
        "indikation",
        "fragestellung",
        "klinische angaben",
        "technik",
        "vergleich",
        "indicación",
        "técnica",
        "indicazione",
        "tecnica",
        "indicação",
    ]
)
_NAME = r"([^\W\d_][^\W\d_]*(?: (?:and|&|des|en)? ?[^\W\d_]+){0,2})"
_HEADING = re.compile(rf"{_NAME}\.?\s*[:：]\s*")
_MARKED_HEADING = re.compile(rf"(?:\[\s*{_NAME}\s*\]\s*[:：]?|{_NAME}\s*[-–—](?=\s|$))\s*")  # without a colon
_LABEL = re.compile(r"[^\W\d_][\w /&(),-]{0,40}\.?[:：](?=\s|$)")
_ITEM = re.compile(r"\(?(?:\d{1,2}|[IVXivx]{1,4})[.)]\s")
_BULLET = re.compile(r"^\s*[-*•·‣◦▪–—#]+\s+")
_EMPHASIS = re.compile(r"(\*{2,3})(?=[\w(\[#])([^*\n]+)(?<=\S)\1|^\s*\*{4,}\s*$", re.MULTILINE)  # Markdown, a rule
_DRAFTS_HEADING = re.compile(r"\b(?:FINDINGS|IMPRESSION):")
_STATE = (
    r"(?:normal|abnormal|unremarkable|clear|sharp|blunted|intact|enlarged|increased|decreased|dilated|widened|none|no|"
    r"yes|not|with|without|absent|present|mild|mildly|moderate|severe|small|large|is|are|shows?)"
)
_BLANK = re.compile(
    r"_{2,}|X{3,}|\*{2,}|\.{3,}|…|\?{2,}|\[[^\]\n]*\]|<[A-Za-z][^<>|\n]{0,40}>|\$?\{+[^{}\n]*\}+|\$\w[^$\n]{0,40}\$|"
    rf"%\w+%|@\w+@|[☐☑☒□▢◻⬜]|\b{_STATE}\s*/\s*{_STATE}\b|\b(?:normal|clear|none?)/[^\W\d_]+\b(?!\s*:)",
    re.IGNORECASE,
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
_ENDED = re.compile(r"[.?!。！？][\"'”’»)\]]*$")
_WRAPPED = 50  # characters: a line at least this long without a full stop continues in the next line
# Words that are frequent in English reports and do not occur in German, French, Spanish or Italian ones.
_ENGLISH = frozenset(
    [
        "the",
        "is",
        "are",
        "and",
        "of",
        "with",
        "without",
        "within",
        "there",
        "not",
        "or",
        "in",
        "on",
        "for",
        "to",
        "seen",
        "has",
        "have",
        "been",
        "be",
        "by",
        "clear",
        "intact",
        "unremarkable",
        "heart",
        "lungs",
        "lung",
        "size",
        "limits",
        "evidence",
        "acute",
        "chest",
        "ribs",
        "bones",
        "bony",
        "osseous",
        "spine",
        "pleural",
        "effusion",
        "effusions",
        "disease",
        "soft",
        "tissues",
        "tissue",
        "film",
        "view",
        "views",
        "findings",
        "abnormality",
        "both",
        "appear",
        "appears",
        "free",
        "normally",
        "well",
        "cardiac",
        "silhouette",
        "contours",
        "structures",
        "hila",
        "mediastinum",
        "airspace",
        "cardiomediastinal",
        "sharp",
        "angles",
        "trachea",
        "pulmonary",
        "vascularity",
        "costophrenic",
        "recesses",
        "cardiomediastinum",
        "parenchyma",
        "skeleton",
        "radiograph",
        "opacity",
        "opacities",
        "masses",
        "vessels",
        "thoracic",
        "hilar",
        "aortic",
        "diaphragm",
        "nad",
        "wnl",
        "appearances",
        "any",
        "change",
        "changes",
        "collapse",
        "device",
        "devices",
        "enlarged",
        "expanded",
        "fracture",
        "fractures",
        "inflated",
        "lesion",
        "lines",
        "loss",
        "low",
        "lobe",
        "lobes",
        "old",
        "scarring",
        "tubes",
        "volumes",
        "outline",
        "shadow",
        "nothing",
    ]
)
# Words of languages in which "no" is a word too; without one of them, "no" is taken as English.
_ROMANCE = re.compile(
    r"\b(se|hay|del?|la|el|l[oae]s?|sin|con|y|il|gli|di|e|non|nel|d[ao]|[es]em|com|derrame|coraz[oó]n|pulmones|cuore|"
    r"polmoni|versamento|coração|pulmões)\b",
    re.IGNORECASE,
)
ENGLISH_SHARE = 0.25


@dataclass(frozen=True)
class Template:
    """A normal report, split into sentences.

    Attributes:
        findings, impression: the sentences of each section, each with its full stop; the impression may be empty.
        english: whether the text is English. Contradictions to image findings can be detected in English only.
    """

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    english: bool

    @property
    def text(self) -> str:
        """The template as one line, ``FINDINGS: … IMPRESSION: …``."""
        return build_target(" ".join(self.findings), " ".join(self.impression) or None)


def parse_template(text: str) -> Template:
    """Parse a normal report: prose or a form, with any headings, labels, bullets or numbered items.

    Headings that mean FINDINGS or IMPRESSION (``CONCLUSION:``, ``Opinion:``, ``BEFUND:``) start that section. What
    follows ``INDICATION:``, ``TECHNIQUE:`` and the like in their line is left out, for it is true of one study only.
    Any other label (``Lungs:``) stays in front of its sentence. A line without a full stop gets one; bullets, Markdown
    marks and invisible characters are removed; and a repeated sentence of a section is used once. No other character
    changes.

    Raises:
        ContextError: the template is not text, has no findings, is too long, is a file name or in another format than
            plain text, or has blanks to fill in, choices to make or a heading inside a sentence.
    """
    if not isinstance(text, str):
        raise ContextError(f"the template must be text, not {type(text).__name__}")
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ContextError(
            f"the template has {len(text):,} characters; the limit is {MAX_TEMPLATE_CHARACTERS:,}: shorten it"
        )
    text = _EMPHASIS.sub(r"\2", remove_invisible(text))
    _refuse_what_is_no_report(text)
    while SPECIAL_TOKEN.search(text):
        text = SPECIAL_TOKEN.sub(" ", text)
    sections: tuple[list[str], list[str]] = ([], [])
    place = 0
    lines = _lines(text)
    concludes = any(_section_of(name[1], False) == 1 for line in lines if (name := _HEADING.match(f"{line}:")))
    for line in lines:
        at, drafted = 0, True
        for start, end in sentence_spans(line):
            if start < at:
                continue
            sentence = line[start:end]
            heading = _HEADING.match(sentence)
            has_findings = bool(sections[0]) and not concludes
            known = None if heading is None else _section_of(heading[1], has_findings)
            if heading is not None:
                drafted = heading[1].casefold() not in _NOT_DRAFTED
            if heading is not None and known is not None:
                place, sentence = known, sentence[heading.end() :]
            elif (known := _section_of(sentence.rstrip(" .:："), has_findings)) is not None:
                place, sentence = known, ""
            if not drafted or not re.search(r"\w", sentence):
                continue
            sentence = sentence if _ENDED.search(sentence) else f"{sentence.rstrip(' ,;')}."
            if normalize(sentence) not in map(normalize, sections[place]):
                sections[place].append(sentence)
    for sentence in (*sections[0], *sections[1]):
        if inner := _DRAFTS_HEADING.search(sentence):
            raise ContextError(
                f"the template has {inner.group()} inside a sentence: put the heading on its own line, and use plain "
                "text"
            )
    if not sections[0]:
        raise ContextError("the template has no findings: give the sentences of a normal report")
    words = [word for part in sections for s in part for word in re.findall(r"[^\W\d_]+", s.lower())]
    english = _ENGLISH if _ROMANCE.search(" ".join(words)) else _ENGLISH | {"no"}
    share = sum(word in english for word in words) / max(1, len(words))
    return Template(tuple(sections[0]), tuple(sections[1]), share >= ENGLISH_SHARE)


def _refuse_what_is_no_report(text: str) -> None:
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
        if _section_of(blank.group().strip("[] "), True) is None:
            raise ContextError(
                f"the template has a blank to fill in ({blank.group()[:20]}): fill it in, or remove the sentence"
            )


def read_template(text: str) -> str:
    """Parse a normal report and format it as ``FINDINGS: … IMPRESSION: …``; see :func:`parse_template`.

    Raises:
        ContextError: as :func:`parse_template`.
    """
    return parse_template(text).text


def _lines(text: str) -> list[str]:
    """The lines of a text, white space normalized, bullets removed, and wrapped sentences joined."""
    lines: list[str] = []
    fresh = True
    for raw in text.splitlines():
        bullet = bool(_BULLET.match(raw))
        line = _BULLET.sub("", raw)
        line = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in line)
        line = re.sub(r"\s+", " ", line).strip()
        if not line:
            fresh = True
            continue
        if (marked := _MARKED_HEADING.match(line)) and _section_of(name := marked[1] or marked[2], True) is not None:
            line = f"{name}: {line[marked.end() :]}".strip()
        before = lines[-1] if lines else ""
        starts = bullet or bool(_LABEL.match(line) or _ITEM.match(line)) or _section_of(line, True) is not None
        heads = before.endswith((":", "："))
        wrapped = line[0].islower() or len(before) >= _WRAPPED
        if (before and not fresh and not starts and (heads or (wrapped and not ends_sentence(before)))) or (
            before and heads and not _LABEL.match(line) and _section_of(before.rstrip(" :："), True) is None
        ):
            lines[-1] = f"{before} {line}"
        else:
            lines.append(line)
        fresh = False
    return lines


def _section_of(name: str, has_findings: bool) -> int | None:
    """The section that a heading starts: 0 findings, 1 impression; ``None`` for other text."""
    words = " ".join(name.casefold().split())
    if words in _RESULT:
        return int(has_findings)
    if words in _FINDINGS or words in ("findings and impression", "findings & impression"):
        return 0
    return 1 if words in _IMPRESSION else None


class Templates:
    """A set of templates, and a classifier that selects one for a clinical context.

    Args:
        texts: the templates, each ``FINDINGS: … IMPRESSION: …``.
        weights: the classifier's, float32 [F, K]; F features of :func:`context_features`, K templates.
        bias: float32 [K].

    Raises:
        ValueError: there is no template, or the sizes do not match.
    """

    def __init__(self, texts: Sequence[str], weights: np.ndarray, bias: np.ndarray):
        if not texts or weights.ndim != 2 or weights.shape[1] != len(texts) or bias.shape != (len(texts),):
            raise ValueError(f"{len(texts)} templates do not match weights {weights.shape} and bias {bias.shape}")
        self.texts = tuple(texts)
        self._scale = np.maximum(np.abs(weights).max(0), 1e-12).astype(np.float32) / 127
        self._weights = np.round(weights / self._scale).astype(np.int8)
        self._bias = bias.astype(np.float32)

    def choose(self, context: ClinicalContext) -> str:
        """The template for a clinical context."""
        buckets, values = context_features(context, len(self._weights))
        rows = self._weights[buckets].astype(np.float32)
        return self.texts[int((values @ rows * self._scale + self._bias).argmax())]

    def save(self, path: Path) -> None:
        """Write ``templates.npz``, with 8-bit weights."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, texts=np.array(self.texts), weights=self._weights, scale=self._scale, bias=self._bias
            )

    @classmethod
    def load(cls, path: Path) -> Templates:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a set of templates.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                texts = [str(text) for text in arrays["texts"]]
                return cls(texts, arrays["weights"] * arrays["scale"], arrays["bias"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile):
            raise BundleError(
                f"{path.name} in {path.parent} is not a set of templates: export the bundle again"
            ) from None


def context_features(context: ClinicalContext, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Hashed character n-grams of indication and comparison, as (buckets, values): int64 and float32 of equal size.

    A value is 1 + log(count); the values have Euclidean norm 1.
    """
    counts: Counter[int] = Counter()
    for word in f"{context.indication or ''} | {context.comparison or ''}".split():
        padded = f" {word} "
        for size in range(LENGTHS[0], LENGTHS[1] + 1):
            for start in range(max(1, len(padded) - size + 1)):
                counts[zlib.crc32(padded[start : start + size].encode()) % buckets] += 1
    values = np.array([1 + math.log(count) for count in counts.values()], np.float32)
    return np.array([*counts], np.int64), values / max(float(np.linalg.norm(values)), 1e-12)
