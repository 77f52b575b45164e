"""Make batches of studies: images (augmented, or cached vision features) and encoded text."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cbedge.findings.image_findings import OTHER
from cbedge.images.preprocess import Preprocessing, chosen_values, preprocess, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext, build_prompt, build_query_instruction, split_sections
from training.base import ModelAndTokenizers
from training.datasets import Study
from training.datasets.mimic_cxr import IndexedStudies
from training.findings import read_tags
from training.ontology import TAGS
from training.special_tokens import prefix_ids, suffix_ids

MAX_TARGET_TOKENS = 160
# Probability that prompted_findings omits a present finding, and that it adds an absent one.
NOISE = {"tags": (0.1, 0.01), "report": (0.05, 0.0)}


def load_pixels(path: Path, settings: Preprocessing, rng: np.random.Generator | None = None) -> np.ndarray:
    """Read one radiograph as the model's input, float32 [3, S, S]; with ``rng``, it is augmented, in grey."""
    radiograph = load_radiograph(path)
    if rng is None:
        return preprocess_radiograph(radiograph, settings)[0]
    pixels = chosen_values(radiograph, replace(settings, colour="grey"))
    if pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255)
    return preprocess(augment(pixels, rng), settings)[0]


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small random rotation, shift, scaling and change of contrast; no mirroring, because sides matter."""
    angle, scale = np.deg2rad(rng.uniform(-7, 7)), rng.uniform(0.85, 1.05)
    rows, columns = pixels.shape
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    centre = np.array([columns / 2, rows / 2])
    shift = rng.uniform(-0.06, 0.06, 2) * (columns, rows)
    a, b, d, e = cos, sin * columns / rows, -sin * rows / columns, cos
    c, f = centre - np.array([[a, b], [d, e]]) @ (centre + shift)
    image = Image.fromarray(pixels).transform(
        (columns, rows), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )
    gamma, gain = np.exp(rng.uniform(-0.25, 0.25)), rng.uniform(0.85, 1.1)
    return np.clip(np.clip(np.asarray(image), 0, 1) ** gamma * gain, 0, 1).astype(np.float32)


def drop_priors(context: ClinicalContext, probability: float, rng: np.random.Generator) -> ClinicalContext:
    """Withhold indication and comparison, each with the given probability, so that the model learns to do without."""
    keep_indication, keep_comparison = rng.random(2) >= probability
    return replace(
        context,
        indication=context.indication if keep_indication else None,
        comparison=context.comparison if keep_comparison else None,
    )


def prompted_findings(
    tags: Sequence[int],
    names: Sequence[str],
    share: float = 1.0,
    rng: np.random.Generator | None = None,
    noise: tuple[float, float] = NOISE["tags"],
) -> tuple[str, ...] | None:
    """The findings in the prompt of a training study, in the form of
    :meth:`cbedge.findings.image_findings.ImageFindings.read`.

    Args:
        tags: 1, 0 or -1 for each of :data:`~training.ontology.TAGS`.
        names: findings that the prompt may list.
        share: share of studies whose prompt lists findings.
        rng: random generator for share and noise, so that the language model does not trust the list completely;
            ``None`` for neither.
        noise: probabilities that a present finding is omitted and that an absent one is added.

    Returns:
        The names, empty for a normal study; ``None`` if the tags are unknown or the prompt has no list.
    """
    if not names or tags[0] < 0 or (rng is not None and rng.random() >= share):
        return None
    present = {name for name in names if tags[TAGS.index(name)] == 1}
    if rng is not None:
        chance = rng.random(len(names))
        missed, invented = noise
        present = {
            name for name, c in zip(names, chance, strict=True) if (c >= missed if name in present else c < invented)
        }
    if present:
        return tuple(name for name in names if name in present)
    return (OTHER,) if tags[0] == 1 else ()


class StudyTags:
    """The tags of training studies for :func:`prompted_findings`.

    Args:
        source: ``tags`` for index terms, ``report`` for the findings that the report names.
    """

    def __init__(self, source: str):
        self.source, self.noise = source, NOISE[source]
        self._read: dict[str, tuple[int, ...]] = {}

    def __call__(self, studies: Sequence[Study]) -> list[tuple[int, ...]]:
        """For each study 1, 0 or -1 for each of :data:`~training.ontology.TAGS`; -1 for a study without the report that
        is read."""
        if self.source == "tags":
            return [tuple(s.tags) for s in studies]
        new = [s for s in studies if s.study_id not in self._read]
        findings = [split_sections(s.target)[0] or s.target for s in new]
        for study, text, tags in zip(new, findings, read_tags(findings), strict=True):
            self._read[study.study_id] = tuple(map(int, tags)) if text else (-1,) * len(TAGS)
        return [self._read[s.study_id] for s in studies]


@dataclass
class Batch:
    """One batch; text is right-padded.

    Attributes:
        images: float [N, 3, S, S], or cached vision features [N, P, H]: the frontal radiographs of the B studies,
            followed by the lateral ones.
        laterals: int64 [N - B], the study index of each lateral radiograph, ascending.
        qformer_ids, qformer_mask: int64 [N, I], the Q-Former's instruction, which names the view.
        input_ids, attention_mask: int64 [B, L], placeholders, prompt and report.
        labels: int64 [B, L], the report's tokens, -100 elsewhere.
        report_ids, report_mask: int64 [B, R], the report for the Q-Former.
        tags: float [B, tags].
        report_tokens: the language model's tokens of each report.
    """

    images: Tensor
    laterals: Tensor
    qformer_ids: Tensor
    qformer_mask: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    report_ids: Tensor
    report_mask: Tensor
    tags: Tensor
    report_tokens: list[list[int]]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def without_placeholders(self, count: int) -> "Batch":
        """The same batch without its ``count`` leading placeholders, for a language model without images."""
        names = ("input_ids", "attention_mask", "labels")
        return replace(self, **{name: getattr(self, name)[:, count:] for name in names})


def encode_prompt(
    parts: ModelAndTokenizers, context: ClinicalContext, seen: Sequence[str] | None = None, lateral: bool = False
) -> list[int]:
    """Token ids of image placeholders and prompt, as in inference; ``lateral`` if there is a second radiograph."""
    prompt = parts.tokenizer(build_prompt(context, seen, lateral), add_special_tokens=False).input_ids
    start = [parts.image_token_id] * (parts.model.config.num_query_tokens * (1 + lateral))
    return [*start, *prefix_ids(parts), *prompt, *suffix_ids(parts)]


def collate(
    parts: ModelAndTokenizers,
    studies: Sequence[Study],
    contexts: list[ClinicalContext],
    images: Tensor,
    seen: Sequence[Sequence[str] | None] | None = None,
    laterals: Sequence[int] = (),
    openings: Sequence[str] = (),
) -> Batch:
    """Encode studies into a batch.

    Args:
        images: see :class:`Batch`.
        laterals: indices of the studies whose lateral radiographs follow the frontal ones, ascending.
        openings: the opening of each report, which has no loss (except for an encoder-decoder).
    """
    seen = seen or [None] * len(studies)
    rows_of = enumerate(zip(contexts, seen, strict=True))
    prompts = [encode_prompt(parts, context, listed, i in laterals) for i, (context, listed) in rows_of]
    targets = [parts.tokenizer(s.target, add_special_tokens=False).input_ids[:MAX_TARGET_TOKENS] for s in studies]
    for prompt, target, text in zip(prompts, targets, openings, strict=False):
        ids = parts.tokenizer(text, add_special_tokens=False).input_ids if text else []
        if parts.model.config.use_decoder_only_language_model:
            prompt += ids
        else:  # its decoder reads the opening
            target[:0] = ids
    eos = parts.tokenizer.eos_token_id
    rows = [p + t + [eos] for p, t in zip(prompts, targets, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), parts.tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    instruction = encode_instructions(parts, [*contexts, *(of_lateral(contexts[i]) for i in laterals)])
    report = parts.qformer_tokenizer(
        [s.target for s in studies], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    return Batch(
        images,
        torch.tensor(laterals, dtype=torch.long),
        instruction["input_ids"],
        instruction["attention_mask"],
        input_ids,
        mask,
        labels,
        report["input_ids"],
        report["attention_mask"],
        torch.tensor([s.tags for s in studies], dtype=torch.float32),
        targets,
    )


def retarget(studies: Sequence[Study], reports: Sequence[tuple[str, str]]) -> tuple[list[str], list[Study]]:
    """The openings of reports, and the studies with the rest of the report as their target."""
    return [text for text, _ in reports], [replace(s, target=t) for s, (_, t) in zip(studies, reports, strict=True)]


def of_lateral(context: ClinicalContext) -> ClinicalContext:
    """The same study's context, for its lateral radiograph."""
    return replace(context, view="lateral")


def encode_instructions(parts: ModelAndTokenizers, contexts: list[ClinicalContext]) -> dict[str, Tensor]:
    """Encode the Q-Former's instructions: ``input_ids`` and ``attention_mask``, int64 [B, I]."""
    texts = [build_query_instruction(c) for c in contexts]
    return parts.qformer_tokenizer(
        texts, padding=True, padding_side="right", truncation=True, max_length=256, return_tensors="pt"
    )


def lengths_and_flags(studies: Sequence[Study]) -> tuple[np.ndarray, np.ndarray]:
    """For each study the number of characters of its target, and whether it is abnormal: int and bool [studies]."""
    if isinstance(studies, IndexedStudies):
        return np.array(studies.lengths), np.array(studies.abnormal, bool)
    return np.array([len(s.target) for s in studies]), np.array([s.abnormal for s in studies], bool)


def epoch_order(
    lengths: np.ndarray, abnormal: np.ndarray, batch_size: int, abnormal_weight: float, rng: np.random.Generator
) -> list[list[int]]:
    """The batches of one epoch, as study indices. Studies of a batch have similar lengths.

    Args:
        lengths: length of each target, int [studies].
        abnormal: bool [studies].
        abnormal_weight: other than 1, studies are sampled with replacement, abnormal ones with this weight.
    """
    count = len(lengths)
    if abnormal_weight != 1.0:
        weight = np.where(abnormal, abnormal_weight, 1.0)
        order = rng.choice(count, count, p=weight / weight.sum())
    else:
        order = rng.permutation(count)
    # Studies are sorted by length within blocks of 16 batches, which avoids most of the padding.
    block = batch_size * 16
    blocks = [order[i : i + block] for i in range(0, len(order), block)]
    ordered = np.concatenate([b[np.argsort(lengths[b], kind="stable")] for b in blocks])
    batches = [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered) - batch_size + 1, batch_size)]
    batches = batches or [ordered.tolist()]
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.inference_mode()
def cache_features(
    vision: torch.nn.Module,
    images: Sequence[tuple[str, Path]],
    settings: Preprocessing,
    views: int,
    folder: Path,
    seed: int,
    device: torch.device,
    autocast: torch.autocast,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Encode views of radiographs, given as (name, file), into a float16 memory map [views, images, P, H].

    View 0 is not augmented, the others are. An existing cache of the same weights, names, settings and seed is opened.
    """
    key = hashlib.sha256(f"{seed} {views} {settings} {[name for name, _ in images]}".encode())
    for name, weight in sorted(vision.state_dict().items()):
        key.update(name.encode() + weight.detach().float().cpu().numpy().tobytes()[:4096])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"features-{key.hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r")
    partial = path.with_suffix(".partial.npy")
    size = 16
    array = None
    vision.eval()
    for view in range(views):
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            pixels = [
                load_pixels(file, settings, np.random.default_rng([seed, view, start + i]) if view else None)
                for i, (_, file) in enumerate(chunk)
            ]
            with autocast:
                features = vision(pixel_values=torch.from_numpy(np.stack(pixels)).to(device)).last_hidden_state
            if array is None:
                shape = (views, len(images), *features.shape[1:])
                array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            array[view, start : start + len(chunk)] = features.float().cpu().numpy()
            if progress is not None:
                progress(len(chunk), views * len(images))
    assert array is not None
    array.flush()
    partial.rename(path)
    return np.load(path, mmap_mode="r")
