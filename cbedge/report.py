"""A draft report with where it came from and how long it took, as text and as JSON."""

import json
from dataclasses import asdict, dataclass

DRAFT_STATEMENT = (
    "Unreviewed draft written by a research model; not a medical device. A radiologist must check and correct it "
    "against the radiograph before any use."
)


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage of one draft, in milliseconds.

    Attributes:
        read: reading and scaling the radiograph.
        vision: the vision encoder.
        qformer: the Q-Former with its projection.
        prefill: the language model over image embeddings and prompt.
        decode: the language model, token by token.
        total: everything from the call to the last token.
    """

    read: float
    vision: float
    qformer: float
    prefill: float
    decode: float
    total: float


@dataclass(frozen=True)
class Report:
    """One draft.

    Attributes:
        findings, impression: the two sections; either can be empty.
        text: the text as the model wrote it.
        complete: ``False`` where the draft was cut off at ``max_new_tokens``.
        model, model_version, variant, device: what wrote it.
        image_findings: findings that the model saw and told itself in the prompt, empty where it saw none; ``None`` for
            a model that is not told. The text can still say otherwise.
        finding_scores: score of every finding that is looked for, 0 to 1; they rank, and are no probabilities.
        image_sha256: of the input file.
        prompt_tokens: image embeddings and prompt; ``new_tokens``: what was written, the stop token not counted.
        guessed_tokens, accepted_tokens: what the phrasebook proposed, and how much of it the model agreed to.
        timings: see :class:`Timings`.
        statement: that this is an unreviewed draft.
    """

    findings: str
    impression: str
    text: str
    complete: bool
    model: str
    model_version: str
    variant: str
    device: str
    image_findings: tuple[str, ...] | None
    finding_scores: dict[str, float]
    image_sha256: str
    prompt_tokens: int
    new_tokens: int
    guessed_tokens: int
    accepted_tokens: int
    timings: Timings
    statement: str = DRAFT_STATEMENT

    def to_json(self) -> str:
        """The report as one JSON object; ``timings_ms`` holds the timings in milliseconds."""
        values = asdict(self)
        values["finding_scores"] = {name: round(score, 3) for name, score in self.finding_scores.items()}
        values["timings_ms"] = {name: round(ms, 1) for name, ms in values.pop("timings").items()}
        return json.dumps(values, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """The report for people: a section a paragraph, and the statement that it is a draft."""
        return f"{format_sections(self.text)}\n\n[{self.statement}]"


def format_sections(text: str) -> str:
    """Put each section on a paragraph of its own."""
    return text.replace(" IMPRESSION:", "\n\nIMPRESSION:").strip()
