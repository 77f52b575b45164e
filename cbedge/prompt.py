"""The clinical context of a study, and all text that the model reads and writes.

Training, export and inference use these functions, so the model gets the same text in all of them.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cbedge.errors import ContextError

PROMPT_VERSION = 2
MAX_CONTEXT_CHARACTERS = 1000
VIEW_NAMES = "frontal (or PA, AP) or lateral (or LAT, LL, RL)"

# What a field without content holds, in lower case and without punctuation at the ends; German words among them.
_NO_TEXT = re.compile(
    r"n/?a|n\.a|none( available)?|null|nil|nan|unknown|unspecified|not (known|available|given|provided|specified)|"
    r"no data|k\. ?a|keine( angabe)?"
)
_NO_PRIOR = re.compile(r"none|nil|n/?a|n\.a|not available|keine")
_TASK = "Describe the chest radiograph."
_JOINED = re.compile("[\u0590-\u0dff][\u200c\u200d][\u0590-\u0dff]")
_DEIDENTIFIED = re.compile(r"X{3,}|_{2,}")
SPECIAL_TOKEN = re.compile(r"</?\|?[A-Za-z_][A-Za-z_0-9]*\|?>|\[(?:CLS|SEP|PAD|UNK|MASK|DEC)\]")


@dataclass(frozen=True)
class ClinicalContext:
    """Prior knowledge about a study for the prompt (the "priors" of Ji et al. 2024).

    Every field is optional; ``None`` means "not given". Text is cleaned: control characters, special tokens and
    de-identification marks (``XXXX``, ``___``) are removed, and white space is collapsed.

    Attributes:
        indication: reason for the study, at most 1,000 characters.
        comparison: prior study to compare with, at most 1,000 characters.
        view: ``"frontal"`` (PA or AP) or ``"lateral"``.

    A field without content, such as ``-``, ``n/a`` or ``XXXX`` from a worklist or table, becomes ``None``. But a
    comparison such as ``none``, ``n/a`` or ``None.`` says that there is no prior study, and becomes ``"None"``.

    Raises:
        ContextError: a field is too long or is not text, or the view is unknown.
    """

    indication: str | None = None
    comparison: str | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        for field in ("indication", "comparison"):
            object.__setattr__(self, field, _checked(field, getattr(self, field)))
        object.__setattr__(self, "view", normalize_view(self.view))


def normalize_view(view: str | None) -> str | None:
    """Map a view name (``frontal``, ``PA``, ``AP``, ``lateral``, ``LL``, ``LATERAL``...) to ``frontal`` or ``lateral``.

    Raises:
        ContextError: the name is unknown.
    """
    if view is None:
        return None
    name = str(view).strip().lower()
    if name in ("frontal", "pa", "ap", "postero-anterior", "antero-posterior"):
        return "frontal"
    if name in ("lateral", "ll", "rl", "lat"):
        return "lateral"
    raise ContextError(f"unknown view; give {VIEW_NAMES}")  # not quoted, since it may be a patient's name


def remove_invisible(text: str) -> str:
    """Remove format characters, such as soft hyphens and zero-width spaces, which may stand inside a word. The joiners
    U+200C and U+200D stay between letters of scripts that need them, as Persian does."""
    return "".join(
        c
        for i, c in enumerate(text)
        if unicodedata.category(c) != "Cf" or _JOINED.fullmatch(text[max(0, i - 1) : i + 2])
    )


def clean_context(text: str) -> str:
    """Collapse white space and remove control characters, special tokens and de-identification marks."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in remove_invisible(text))
    while SPECIAL_TOKEN.search(text):
        text = SPECIAL_TOKEN.sub(" ", text)
    text = _DEIDENTIFIED.sub(" ", text)
    text = re.sub(r"\s+([.,;:?])", r"\1", re.sub(r"\s+", " ", text))
    return text.strip(" .,;:-")


def _checked(field: str, text: str | None) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise ContextError(f"the {field} must be text, not {type(text).__name__}")
    if len(text) > MAX_CONTEXT_CHARACTERS:
        raise ContextError(
            f"the {field} has {len(text):,} characters; at most {MAX_CONTEXT_CHARACTERS:,} are allowed: shorten it"
        )
    cleaned = clean_context(text)
    if field == "comparison" and _NO_PRIOR.fullmatch(cleaned.casefold()):
        return "None"  # as most training reports write it
    known = field == "comparison" and cleaned.casefold() == "none available"  # many training reports write this
    return cleaned if known or not is_no_text(cleaned) else None


def is_no_text(text: str) -> bool:
    """Whether a field of a worklist, table or header has no content: no letter or digit, or a word such as "none"."""
    words = " ".join(clean_context(text).casefold().split())
    return bool(_NO_TEXT.fullmatch(words)) or not any(c.isalnum() for c in words)


def build_query_instruction(context: ClinicalContext) -> str:
    """The instruction that the Q-Former reads: the task and the view.

    Only the language model reads indication and comparison. A Q-Former that reads them learns to predict the report
    from them instead of from the image. Without them, its output can be reused when the indication is edited.
    """
    return _TASK + (f" View: {context.view}." if context.view else "")


def build_instruction(context: ClinicalContext, lateral: bool = False) -> str:
    """The instruction that the language model reads: one line, with the fields in a fixed order.

    A field that is not given is omitted. Training also omits fields at random, so the model is used to it. ``lateral``
    says whether a lateral radiograph follows the frontal one.
    """
    parts = [f"{_TASK} View: frontal and lateral." if lateral else build_query_instruction(context)]
    if context.indication:
        parts.append(f"Indication: {context.indication}.")
    if context.comparison:
        parts.append(f"Comparison: {context.comparison}.")
    return " ".join(parts)


def build_prompt(context: ClinicalContext, seen: Sequence[str] | None = None, lateral: bool = False) -> str:
    """The text between the image embeddings (32 per radiograph) and the report in the language model's input.

    Args:
        context: clinical context of the study.
        seen: the image findings (:mod:`cbedge.findings.image_findings`), possibly empty; ``None`` for a model whose
            prompt does not list them.
        lateral: whether the embeddings of a lateral radiograph follow those of the frontal one.
    """
    listed = "" if seen is None else f"Seen: {', '.join(seen) or 'none'}.\n"
    return f"\n{build_instruction(context, lateral)}\n{listed}Report:\n"


def build_target(findings: str | None, impression: str | None) -> str:
    """The text that the model learns to write: ``FINDINGS: … IMPRESSION: …``; a missing section is omitted."""
    parts = [f"{name}: {text}" for name, text in (("FINDINGS", findings), ("IMPRESSION", impression)) if text]
    return " ".join(parts)


def build_opening(sentences: Sequence[str]) -> list[str]:
    """The texts of the opening sentences of a draft; the first includes the heading. Joined, they start the draft."""
    return [f"FINDINGS: {text}" if i == 0 else f" {text}" for i, text in enumerate(sentences)]


def split_sections(report: str) -> tuple[str, str]:
    """Split generated text into findings and impression; text before any heading counts as findings."""
    head, _, tail = report.partition("IMPRESSION:")
    return head.replace("FINDINGS:", "", 1).strip(), tail.strip()
