"""Compare exported variants with torch: the output of each graph, and the tokens of whole drafts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from cbedge.backends import Backend
from cbedge.decoding import decode
from cbedge.findings.image_findings import scores_of
from cbedge.images.preprocess import Preprocessing, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext
from training.base import ModelAndTokenizers
from training.batches import encode_instructions, encode_prompt
from training.special_tokens import start_ids, stop_ids
from training.stages import embed_inputs, encode_images, query_image

GREEDY_TOKENS = 64
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
        megabytes: size of its files in MB.
        graph_errors: largest absolute error of each graph, with torch's inputs.
        relative_errors: relative error of each graph, by Euclidean norm.
        token_agreement: share of torch's tokens that the variant also chooses after the same tokens.
        drafts_equal: share of equal drafts.
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
        cases: number of studies.
        source: where the radiographs come from.
        fp32_cases, fp32_equal: number of drafts of up to 64 tokens compared in fp32, and of equal ones.
        variants: the exported variants and ``fp32``.
    """

    merge_error: float
    cases: int
    source: str
    fp32_cases: int
    fp32_equal: int
    variants: dict[str, VariantParity]

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
            "are the largest absolute error and the relative error (Euclidean norm).",
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
    pixels = preprocess_radiograph(load_radiograph(EXAMPLE), settings)
    indications = (None, "cough", "chest pain", "shortness of breath", "fever", "preoperative evaluation")
    contexts = [ClinicalContext(indication=words, view="frontal") for words in indications]
    return [Case(pixels, c) for c in contexts][:count], "the example radiograph with several indications"


@torch.inference_mode()
def compare(
    parts: ModelAndTokenizers,
    backends: Mapping[str, Callable[[], Backend]],
    megabytes: dict[str, float],
    cases: list[Case],
    source: str,
    merge_error: float,
    fp32_cases: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Compare every variant, including ``fp32``, with the merged torch model.

    Args:
        parts: the merged model.
        backends: functions that open a variant; one is open at a time.
        megabytes: size of each variant in MB.
        cases, source: from :func:`parity_cases`.
        merge_error: from :func:`export.merge.merge`.
        fp32_cases: number of drafts that are compared token by token in fp32.
        progress: gets the number of finished drafts, and of all drafts.
    """
    reference = TorchReference(parts)
    wanted = []
    total = len(cases) * (1 + len(backends))
    done = iter(range(1, total + 1))

    def tell() -> None:
        if progress:
            progress(next(done), total)

    for case in cases:
        wanted.append(reference.greedy(case))
        tell()
    equal, variants = 0, {}
    for name, opened in backends.items():
        backend = opened()
        if name == "fp32":
            equal = sum(_greedy(backend, reference, c) == w for c, w in zip(cases[:fp32_cases], wanted, strict=False))
        agreed, same = 0, 0
        for case, tokens in zip(cases, wanted, strict=True):
            forced = _forced(backend, reference, case, tokens)
            agreed += sum(a == b for a, b in zip(forced, tokens, strict=True))
            same += forced == tokens
            tell()
        errors, relative = _graph_errors(reference, backend, cases[0])
        variants[name] = VariantParity(
            megabytes[name], errors, relative, agreed / sum(map(len, wanted)), same / len(cases)
        )
    return Parity(merge_error, len(cases), source, min(fp32_cases, len(cases)), equal, variants)


@dataclass(frozen=True)
class TorchReading:
    """Output of torch for one radiograph before the language model.

    Attributes:
        features: output of the vision encoder, float32 [1, P, H].
        projected: image embeddings, float32 [1, Q, D].
        finding_logits: float32 [T], or ``None`` without a finding head.
        prompt: token ids of image placeholders and prompt.
    """

    features: torch.Tensor
    projected: torch.Tensor
    finding_logits: torch.Tensor | None
    prompt: list[int]


class TorchReference:
    """The merged torch model, used as the runtime uses its graphs."""

    def __init__(self, parts: ModelAndTokenizers):
        self.parts = parts
        self.stop_ids = stop_ids(parts)

    def instruction(self, case: Case) -> torch.Tensor:
        """The Q-Former's tokens of the instruction, int64 [1, I]."""
        return encode_instructions(self.parts, [case.context])["input_ids"]

    def read(self, case: Case) -> TorchReading:
        """The output of vision encoder, Q-Former and finding head."""
        ids = self.instruction(case)
        features = encode_images(self.parts.model, torch.from_numpy(case.pixels))
        output, projected = query_image(self.parts.model, features, ids, torch.ones_like(ids))
        head = self.parts.finding_head
        prompt = encode_prompt(self.parts, case.context, head.read(output)[0] if head else None)
        return TorchReading(features, projected, head.logits(output)[0] if head else None, prompt)

    def embeds(self, case: Case) -> torch.Tensor:
        """The language model's input, float32 [1, L, D]."""
        reading = self.read(case)
        return embed_inputs(self.parts.model, torch.tensor([reading.prompt]), reading.projected)

    def greedy(self, case: Case) -> list[int]:
        """Up to 64 greedy tokens, including the stop token."""
        out = self.begin(self.embeds(case))
        tokens: list[int] = []
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if tokens[-1] in self.stop_ids or len(tokens) == GREEDY_TOKENS:
                return tokens
            out = self._advance(tokens[-1], out)

    def begin(self, embeds: torch.Tensor) -> ModelOutput:
        """Logits and cache of the language model for its input, float32 [1, L, D]."""
        model, start = self.parts.model.language_model, start_ids(self.parts)
        if not start:
            return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        return model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([start]), use_cache=True)

    def _advance(self, token: int, out: ModelOutput) -> ModelOutput:
        model, ids, past = self.parts.model.language_model, torch.tensor([[token]]), out.past_key_values
        if not start_ids(self.parts):
            return model(input_ids=ids, past_key_values=past, use_cache=True)
        encoded = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        return model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=past, use_cache=True)


def _onnx_embeds(backend: Backend, reference: TorchReference, case: Case) -> np.ndarray:
    image, _, logits = backend.query_image(backend.encode_image(case.pixels), reference.instruction(case).numpy())
    head = reference.parts.finding_head
    seen = head.findings.read(scores_of(logits)) if head is not None and logits is not None else None
    prompt = encode_prompt(reference.parts, case.context, seen)[image.shape[1] :]
    return np.concatenate([image, backend.embed_tokens(np.array([prompt], np.int64))], axis=1)


def _greedy(backend: Backend, reference: TorchReference, case: Case) -> list[int]:
    embeds = _onnx_embeds(backend, reference, case)
    decoder = backend.new_decoder(embeds.shape[1] + GREEDY_TOKENS)
    logits = decoder.prefill(embeds)
    return [token.id for token in decode(decoder, logits, reference.stop_ids, GREEDY_TOKENS)]


def _forced(backend: Backend, reference: TorchReference, case: Case, wanted: list[int]) -> list[int]:
    """The variant's token at every position after torch's tokens."""
    embeds = _onnx_embeds(backend, reference, case)
    decoder = backend.new_decoder(embeds.shape[1] + GREEDY_TOKENS)
    logits = decoder.prefill(embeds)
    chosen = [int(logits.argmax())]
    for token in wanted[:-1]:
        chosen.append(int(decoder.append([token])[-1].argmax()))
    return chosen


def _graph_errors(reference: TorchReference, backend: Backend, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Absolute and relative errors of each graph with torch's inputs, so that errors do not add up."""
    model, ids = reference.parts.model, reference.instruction(case)
    reading = reference.read(case)
    prompt = np.array([reading.prompt[reading.projected.shape[1] :]], np.int64)
    tokens = model.get_input_embeddings()(torch.from_numpy(prompt))
    embeds = embed_inputs(model, torch.tensor([reading.prompt]), reading.projected)
    logits = reference.begin(embeds).logits[0, -1]
    image_embeds, _, finding_logits = backend.query_image(reading.features.numpy(), ids.numpy())
    pairs = {
        "vision_encoder": (backend.encode_image(case.pixels), reading.features),
        "qformer": (image_embeds, reading.projected),
        "embed_tokens": (backend.embed_tokens(prompt), tokens),
        "decoder_model_merged": (backend.new_decoder(embeds.shape[1]).prefill(embeds.numpy()), logits),
    }
    if finding_logits is not None and reading.finding_logits is not None:
        pairs["qformer, findings"] = (finding_logits, reading.finding_logits)
    absolute, relative = {}, {}
    for kind, (ours, theirs) in pairs.items():
        true = theirs.float().numpy()
        absolute[kind] = float(np.abs(ours - true).max())
        relative[kind] = float(np.linalg.norm(ours - true) / np.linalg.norm(true))
    return absolute, relative


def write_parity(parity: Parity, folder: Path) -> None:
    """Record a parity table as JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parity.json").write_text(json.dumps(asdict(parity), indent=1) + "\n", encoding="utf-8")
    (folder / "parity.md").write_text(f"# Parity with torch\n\n{parity.to_markdown()}\n", encoding="utf-8")
