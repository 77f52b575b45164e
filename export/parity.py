"""Compare exported variants with torch: the output of each graph, and the tokens of whole drafts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cbedge.backends import Backend
from cbedge.backends.torch_model import TorchBackend
from cbedge.decoding import decode
from cbedge.findings.image_findings import scores_of
from cbedge.images.preprocess import Preprocessing, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext
from cbedge.provenance import provenance
from training.base import ModelAndTokenizers
from training.batches import encode_instructions, encode_prompt
from training.records import origin, write_record
from training.special_tokens import stop_ids

GREEDY_TOKENS = 64
FP32_CASES = 8  # drafts that are compared token by token in fp32
GRAPH_CASES = 8  # cases whose graphs are compared
EXAMPLE = Path(__file__).parent.parent / "examples" / "chest_pa.png"


@dataclass(frozen=True)
class Case:
    """One radiograph, float32 [1, 3, S, S], and its context."""

    pixels: np.ndarray
    context: ClinicalContext


@dataclass(frozen=True)
class VariantParity:
    """Differences of one variant from torch in fp32.

    Attributes:
        graph_errors: largest absolute error of each graph over several cases, with torch's inputs.
        relative_errors: relative error of each graph over the same cases, by Euclidean norm.
        token_agreement: share of torch's tokens that the variant also chooses after the same tokens.
    """

    megabytes: float
    graph_errors: dict[str, float]
    relative_errors: dict[str, float]
    token_agreement: float
    drafts_equal: float


@dataclass(frozen=True)
class Parity:
    """Differences of the exported variants from torch in fp32.

    Attributes:
        merge_error: largest difference of a logit between merged and unmerged model, relative to the largest logit.
        fp32_cases, fp32_equal: number of drafts of up to 64 tokens compared in fp32, and of equal ones.
        variants: the exported variants and ``fp32``.
        graph_cases: number of cases whose graphs were compared; 1 in records that do not say.
    """

    merge_error: float
    cases: int
    source: str
    fp32_cases: int
    fp32_equal: int
    variants: dict[str, VariantParity]
    graph_cases: int = 1

    def to_markdown(self) -> str:
        """The parity table for the model card and the terminal."""
        kinds = list(next(iter(self.variants.values())).graph_errors)
        lines = [
            "| variant | MB | equal tokens | equal drafts | " + " | ".join(kinds) + " |",
            "| --- |" + " ---: |" * (3 + len(kinds)),
        ]
        for name, v in self.variants.items():
            errors = " | ".join(f"{v.graph_errors[k]:.1e} ({v.relative_errors[k]:.1%})" for k in kinds)
            lines.append(f"| {name} | {v.megabytes:.1f} | {v.token_agreement:.1%} | {v.drafts_equal:.0%} | {errors} |")
        lines += [
            "",
            f"- {self.cases} cases ({self.source}), up to {GREEDY_TOKENS} tokens each. *Equal tokens*: share of "
            "positions at which the variant chooses the token of torch in fp32 after the same tokens. Errors of graphs "
            f"are the largest absolute error and the relative error (Euclidean norm) over {self.graph_cases} case(s).",
            f"- Merging the adapters changes the fp32 logits by at most {self.merge_error:.1e} of the largest logit.",
            f"- fp32: {self.fp32_equal} of {self.fp32_cases} greedy drafts of {GREEDY_TOKENS} tokens equal torch's.",
        ]
        return "\n".join(lines)


def parity_cases(settings: Preprocessing, data: Path | None, count: int) -> tuple[list[Case], str]:
    """Validation studies of IU X-RAY at ``data``; without it, the example radiograph with several indications."""
    if data is not None:
        from training.datasets.iu_xray import read_studies

        studies = read_studies(data, ("val",))[:count]
        cases = [Case(preprocess_radiograph(load_radiograph(s.image), settings), s.context) for s in studies]
        return cases, f"{len(cases)} validation studies of IU X-RAY"
    pixels = example_pixels(settings)
    indications = (None, "cough", "chest pain", "shortness of breath", "fever", "preoperative evaluation")
    contexts = [ClinicalContext(indication=words, view="frontal") for words in indications]
    return [Case(pixels, c) for c in contexts][:count], "the example radiograph with several indications"


def example_pixels(settings: Preprocessing) -> np.ndarray:
    """The example radiograph, float32 [1, 3, S, S]."""
    return preprocess_radiograph(load_radiograph(EXAMPLE), settings)


def compare(
    parts: ModelAndTokenizers,
    backends: Mapping[str, Callable[[], Backend]],
    megabytes: dict[str, float],
    cases: list[Case],
    source: str,
    merge_error: float,
    progress: Callable[[int, int], None],
) -> Parity:
    """Compare every variant, including ``fp32``, with the merged torch model.

    Args:
        backends: functions that open a variant; one is open at a time.
        cases, source: from :func:`parity_cases`.
        merge_error: from :func:`export.merge.merge`.
        progress: gets the number of finished drafts, and of all drafts.
    """
    exact = TorchBackend(parts.model, parts.finding_head.tensors if parts.finding_head else None)
    wanted = []
    total = len(cases) * (1 + len(backends))
    done = iter(range(1, total + 1))
    for case in cases:
        wanted.append(_greedy(exact, parts, case))
        progress(next(done), total)
    equal, variants = 0, {}
    for name, opened in backends.items():
        backend = opened()
        if name == "fp32":
            equal = sum(_greedy(backend, parts, c) == w for c, w in zip(cases[:FP32_CASES], wanted, strict=False))
        agreed, same = 0, 0
        for case, tokens in zip(cases, wanted, strict=True):
            forced = _forced(backend, parts, case, tokens)
            agreed += sum(a == b for a, b in zip(forced, tokens, strict=True))
            same += forced == tokens
            progress(next(done), total)
        errors, relative = _graph_errors(exact, backend, parts, cases[:GRAPH_CASES])
        variants[name] = VariantParity(
            megabytes[name], errors, relative, agreed / sum(map(len, wanted)), same / len(cases)
        )
    compared = (min(count, len(cases)) for count in (FP32_CASES, GRAPH_CASES))
    return Parity(merge_error, len(cases), source, next(compared), equal, variants, next(compared))


def _instruction(parts: ModelAndTokenizers, case: Case) -> np.ndarray:
    """The Q-Former's tokens of the instruction, int64 [1, I]."""
    return encode_instructions(parts, [case.context])["input_ids"].numpy()


def _read(backend: Backend, parts: ModelAndTokenizers, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A backend's input of the language model, float32 [1, L, D]; and its prompt, int64 [1, tokens]."""
    image, _, logits = backend.query_image(backend.encode_image(case.pixels), _instruction(parts, case))
    head = parts.finding_head
    seen = head.findings.read(scores_of(logits)) if head is not None and logits is not None else None
    prompt = np.array([encode_prompt(parts, case.context, seen)[image.shape[1] :]], np.int64)
    return np.concatenate([image, backend.embed_tokens(prompt)], axis=1), prompt


def _greedy(backend: Backend, parts: ModelAndTokenizers, case: Case) -> list[int]:
    """Up to 64 greedy tokens, including the stop token."""
    embeds, _ = _read(backend, parts, case)
    decoder = backend.new_decoder(embeds.shape[1] + GREEDY_TOKENS)
    return [token.id for token in decode(decoder, decoder.prefill(embeds), stop_ids(parts), GREEDY_TOKENS)]


def _forced(backend: Backend, parts: ModelAndTokenizers, case: Case, wanted: list[int]) -> list[int]:
    """The variant's token at every position after torch's tokens."""
    embeds, _ = _read(backend, parts, case)
    decoder = backend.new_decoder(embeds.shape[1] + GREEDY_TOKENS)
    logits = decoder.prefill(embeds)
    chosen = [int(logits.argmax())]
    for token in wanted[:-1]:
        chosen.append(int(decoder.append([token])[-1].argmax()))
    return chosen


def _graph_errors(
    exact: Backend, backend: Backend, parts: ModelAndTokenizers, cases: Sequence[Case]
) -> tuple[dict[str, float], dict[str, float]]:
    """Absolute and relative errors of each graph over the cases, with torch's inputs, so that errors do not add up."""
    largest: dict[str, float] = {}
    squares: dict[str, np.ndarray] = {}  # of the differences and of torch's values
    for case in cases:
        for kind, (ours, theirs) in _graph_outputs(exact, backend, parts, case).items():
            largest[kind] = max(largest.get(kind, 0.0), float(np.abs(ours - theirs).max()))
            squares[kind] = squares.get(kind, 0.0) + np.square([np.linalg.norm(ours - theirs), np.linalg.norm(theirs)])
    return largest, {kind: float(np.sqrt(error / whole)) for kind, (error, whole) in squares.items()}


def _graph_outputs(
    exact: Backend, backend: Backend, parts: ModelAndTokenizers, case: Case
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The outputs of each graph, of the backend and of torch, both with torch's inputs."""
    features, instruction = exact.encode_image(case.pixels), _instruction(parts, case)
    embeds, prompt = _read(exact, parts, case)
    (our_image, _, our_logits), (image, _, logits) = (b.query_image(features, instruction) for b in (backend, exact))
    ours, theirs = (b.new_decoder(embeds.shape[1]).prefill(embeds) for b in (backend, exact))
    pairs = {
        "vision_encoder": (backend.encode_image(case.pixels), features),
        "qformer": (our_image, image),
        "embed_tokens": (backend.embed_tokens(prompt), exact.embed_tokens(prompt)),
        "decoder_model_merged": (ours, theirs),
    }
    if our_logits is not None and logits is not None:
        pairs["qformer, findings"] = (our_logits, logits)
    return pairs


def write_parity(parity: Parity, bundle: Path, folder: Path) -> None:
    """Record the parity table of a bundle, with its provenance, as JSON and Markdown in a folder."""
    record = provenance(parity.source, bundle, ("torch", "transformers")) | asdict(parity)
    page = f"# Parity with torch\n\n{origin(record)}\n\n{parity.to_markdown()}\n"
    write_record(record, page, folder / "parity")
