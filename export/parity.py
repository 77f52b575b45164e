"""Compare what was exported with torch: each graph's numbers, and the tokens that come out of the whole."""

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
    """One radiograph, float32 [1, 3, S, S], with its context."""

    pixels: np.ndarray
    context: ClinicalContext


@dataclass(frozen=True)
class VariantParity:
    """How far one variant's graphs are from torch in fp32.

    Attributes:
        megabytes: of its graphs.
        graph_errors: largest absolute error of each graph, given torch's own inputs.
        relative_errors: the same errors' Euclidean norm as a share of the output's.
        token_agreement: share of torch's tokens that the variant, having read the same before, also chooses.
        drafts_equal: share of whole drafts that are equal.
    """

    megabytes: float
    graph_errors: dict[str, float]
    relative_errors: dict[str, float]
    token_agreement: float
    drafts_equal: float


@dataclass(frozen=True)
class Parity:
    """How far the exported graphs are from torch in fp32.

    Attributes:
        merge_error: largest difference of any logit between merged and unmerged model, as a share of the largest logit.
        cases: studies that were compared.
        source: where the radiographs come from.
        fp32_cases, fp32_equal: drafts of up to 64 tokens compared in fp32, and how many are equal token by token.
        variants: the exported variants, and ``fp32``.
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
            "| variant | MB | torch's token | equal drafts | " + " | ".join(kinds) + " |",
            "| --- |" + " ---: |" * (3 + len(kinds)),
        ]
        for name, v in self.variants.items():
            errors = " | ".join(f"{v.graph_errors[k]:.1e} ({v.relative_errors[k]:.1%})" for k in kinds)
            lines.append(f"| {name} | {v.megabytes:.1f} | {v.token_agreement:.1%} | {v.drafts_equal:.0%} | {errors} |")
        return "\n".join(
            [
                *lines,
                "",
                f"- {self.cases} cases ({self.source}), up to {GREEDY_TOKENS} tokens each. *torch's token*: share of "
                "positions at which the variant, having read the same before, chooses torch's token in fp32. "
                "Errors of graphs: largest absolute, and Euclidean as a share of the output.",
                f"- Adapters merged: fp32 logits within {self.merge_error:.1e} of the unmerged model's, as "
                "a share of the largest.",
                f"- fp32: {self.fp32_equal} of {self.fp32_cases} greedy drafts of {GREEDY_TOKENS} tokens "
                "equal torch's.",
            ]
        )


def parity_cases(settings: Preprocessing, data: Path | None, count: int) -> tuple[list[Case], str]:
    """Validation studies of IU X-RAY where ``data`` is given, else the example radiograph under several indications."""
    if data is not None:
        from training.datasets.iu_xray import read_studies

        studies = read_studies(data, ("val",))[:count]
        cases = [Case(preprocess_radiograph(load_radiograph(s.image), settings), s.context) for s in studies]
        return cases, f"{len(cases)} validation studies of IU X-RAY"
    pixels = preprocess_radiograph(load_radiograph(EXAMPLE), settings)
    indications = (None, "cough", "chest pain", "shortness of breath", "fever", "preoperative evaluation")
    contexts = [ClinicalContext(indication=words, view="frontal") for words in indications]
    return [Case(pixels, c) for c in contexts][:count], "the example radiograph under several indications"


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
    """Measure parity of every variant, ``fp32`` among them, against the merged torch model.

    Args:
        parts: the merged model.
        backends: open each variant; one is open at a time.
        megabytes: size of each variant.
        cases, source: of :func:`parity_cases`.
        merge_error: what :func:`export.merge.merge` returned.
        fp32_cases: how many drafts are compared token by token in fp32.
        progress: is told how many drafts are done, of how many.
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
class Look:
    """What torch makes of one radiograph before the language model reads.

    Attributes:
        features: of the vision encoder, float32 [1, P, H].
        projected: image embeddings, float32 [1, Q, D].
        finding_logits: float32 [T], or ``None`` where the model is not told what it sees.
        prompt: token ids of image placeholders and prompt.
    """

    features: torch.Tensor
    projected: torch.Tensor
    finding_logits: torch.Tensor | None
    prompt: list[int]


class TorchReference:
    """The merged torch model, asked the way the runtime asks its graphs."""

    def __init__(self, parts: ModelAndTokenizers):
        self.parts = parts
        self.stop_ids = stop_ids(parts)

    def instruction(self, case: Case) -> torch.Tensor:
        """The Q-Former's tokens of the instruction, int64 [1, I]."""
        return encode_instructions(self.parts, [case.context])["input_ids"]

    def look(self, case: Case) -> Look:
        """What vision encoder, Q-Former and finding head make of the image."""
        ids = self.instruction(case)
        features = encode_images(self.parts.model, torch.from_numpy(case.pixels))
        output, projected = query_image(self.parts.model, features, ids, torch.ones_like(ids))
        head = self.parts.finding_head
        prompt = encode_prompt(self.parts, case.context, head.read(output)[0] if head else None)
        return Look(features, projected, head.logits(output)[0] if head else None, prompt)

    def embeds(self, case: Case) -> torch.Tensor:
        """The language model's input, float32 [1, L, D]."""
        look = self.look(case)
        return embed_inputs(self.parts.model, torch.tensor([look.prompt]), look.projected)

    def greedy(self, case: Case) -> list[int]:
        """Up to 64 greedy tokens, the stop token included."""
        out = self.begin(self.embeds(case))
        tokens: list[int] = []
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if tokens[-1] in self.stop_ids or len(tokens) == GREEDY_TOKENS:
                return tokens
            out = self._go_on(tokens[-1], out)

    def begin(self, embeds: torch.Tensor) -> ModelOutput:
        """What the language model answers to its input, float32 [1, L, D]: logits, and its cache."""
        model, start = self.parts.model.language_model, start_ids(self.parts)
        if not start:
            return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        return model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([start]), use_cache=True)

    def _go_on(self, token: int, out: ModelOutput) -> ModelOutput:
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
    """The variant's choice at every position, given torch's tokens before it."""
    embeds = _onnx_embeds(backend, reference, case)
    decoder = backend.new_decoder(embeds.shape[1] + GREEDY_TOKENS)
    logits = decoder.prefill(embeds)
    chosen = [int(logits.argmax())]
    for token in wanted[:-1]:
        chosen.append(int(decoder.append([token])[-1].argmax()))
    return chosen


def _graph_errors(reference: TorchReference, backend: Backend, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Each graph on torch's own inputs, so that one graph's error does not count for the next: absolute, relative."""
    model, ids = reference.parts.model, reference.instruction(case)
    look = reference.look(case)
    prompt = np.array([look.prompt[look.projected.shape[1] :]], np.int64)
    tokens = model.get_input_embeddings()(torch.from_numpy(prompt))
    embeds = embed_inputs(model, torch.tensor([look.prompt]), look.projected)
    logits = reference.begin(embeds).logits[0, -1]
    image_embeds, _, finding_logits = backend.query_image(look.features.numpy(), ids.numpy())
    pairs = {
        "vision_encoder": (backend.encode_image(case.pixels), look.features),
        "qformer": (image_embeds, look.projected),
        "embed_tokens": (backend.embed_tokens(prompt), tokens),
        "decoder_model_merged": (backend.new_decoder(embeds.shape[1]).prefill(embeds.numpy()), logits),
    }
    if finding_logits is not None and look.finding_logits is not None:
        pairs["qformer, findings"] = (finding_logits, look.finding_logits)
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
