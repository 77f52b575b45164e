from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, draw_chest, draw_lateral

from cbedge import ReportGenerator
from cbedge.drafting.query import read_images
from cbedge.findings.image_findings import scores_of
from cbedge.images.preprocess import Preprocessing, preprocess
from cbedge.prompt import ClinicalContext, build_prompt
from training.base import ModelAndTokenizers
from training.batches import Batch, collate, encode_instructions, encode_prompt, load_pixels, of_lateral
from training.config import Stage, load_config
from training.datasets import open_studies
from training.losses import AlignmentHeads, StageLosses
from training.settings import ConfigError
from training.stages import embed_inputs, encode_images, query_image
from training.trained import checkpoint_of, load_adapted, merge_adapters
from training.views import by_study, mean_by_study


@pytest.fixture(scope="module")
def parts(tiny_run: Path) -> ModelAndTokenizers:
    parts = load_adapted(checkpoint_of(tiny_run), [tiny_run], tiny_run)
    merge_adapters(parts)
    return parts


def test_rows_of_images_come_together_by_study():
    rows = torch.tensor([[1.0], [2.0], [3.0], [30.0]])
    stacked, there = by_study(rows, 3, torch.tensor([2]))
    assert stacked.squeeze(-1).tolist() == [[1, 0], [2, 0], [3, 30]]
    assert there.tolist() == [[True, False], [True, False], [True, True]]
    assert mean_by_study(rows, 3, torch.tensor([2])).tolist() == [[1], [2], [16.5]]


def test_a_run_that_reads_both_views_says_so_where_it_goes(parts: ModelAndTokenizers, tiny_bundle: Path):
    assert parts.reads_lateral and ReportGenerator.from_pretrained(tiny_bundle).reads_lateral


def make_batch(parts: ModelAndTokenizers, data: Path, laterals: list[int]) -> Batch:
    studies = open_studies(data, ("train",), 3)
    images = [s.image for s in studies] + [studies[i].lateral for i in laterals]
    pixels = torch.from_numpy(np.stack([load_pixels(file, Preprocessing()) for file in images]))
    return collate(parts, studies, [s.context for s in studies], pixels, None, laterals)


@torch.inference_mode()
def test_a_lateral_radiograph_changes_its_own_study_alone(parts: ModelAndTokenizers, tiny_data: Path):
    count = parts.model.config.num_query_tokens
    alone, both = (make_batch(parts, tiny_data, laterals) for laterals in ([], [1]))
    assert (both.input_ids == parts.image_token_id).sum(1).tolist() == [count, 2 * count, count]
    embeds = []
    for batch in (alone, both):
        features = encode_images(parts.model, batch.images)
        _, projected = query_image(parts.model, features, batch.qformer_ids, batch.qformer_mask)
        embeds.append(embed_inputs(parts.model, batch.input_ids, projected, batch.laterals))
    for study in (0, 2):
        length = int(alone.attention_mask[study].sum())
        assert torch.allclose(embeds[0][study, :length], embeds[1][study, :length], atol=1e-6)
    assert torch.allclose(embeds[1][1, :count], embeds[0][1, :count], atol=1e-6)
    assert torch.allclose(embeds[1][1, count : 2 * count], projected[3], atol=1e-6)


def test_every_loss_takes_studies_of_one_and_of_two_radiographs(
    parts: ModelAndTokenizers, tiny_data: Path, tmp_path: Path
):
    hidden = parts.model.config.qformer_config.hidden_size
    heads = AlignmentHeads(hidden, 17, torch.tensor([5, 6]), torch.tensor([0.5, 0.5]))
    stage = four_losses(tmp_path)
    batch = make_batch(parts, tiny_data, [1])
    found = StageLosses(parts, heads, stage)(batch, False)
    assert set(found) == set(stage.losses) and all(torch.isfinite(value) for value, _ in found.values())
    sum(value for value, _ in found.values()).backward()
    assert heads.tag_weight.grad.abs().sum() > 0 and torch.isfinite(heads.word_gain.grad)


def four_losses(folder: Path) -> Stage:
    path = folder / "stage.yaml"
    path.write_text(TINY_RUN.format(base="mini"))
    stage = next(s for s in load_config(path).stages if s.name == "vision")
    return replace(stage, losses={"contrastive": 1.0, "tags": 1.0, "words": 1.0, "language": 1.0})


def test_an_image_blind_stage_reads_no_lateral_radiograph(tmp_path: Path):
    path = tmp_path / "blind.yaml"
    path.write_text(TINY_RUN.format(base="mini").replace("image_blind: true", "image_blind: true\n    lateral: true"))
    with pytest.raises(ConfigError, match="wording: an image-blind stage"):
        load_config(path)


@torch.inference_mode()
def test_the_runtime_sees_of_two_radiographs_what_torch_sees(parts: ModelAndTokenizers, tiny_bundle: Path):
    generator = ReportGenerator.from_pretrained(tiny_bundle, "fp32", "cpu")
    context = ClinicalContext("cough", view="frontal")
    pixels = [preprocess(np.float32(film) / 255, Preprocessing()) for film in (draw_chest(3), draw_lateral(3))]
    features = encode_images(parts.model, torch.from_numpy(np.concatenate(pixels)))
    text = encode_instructions(parts, [context, of_lateral(context)])
    output, projected = query_image(parts.model, features, text["input_ids"], text["attention_mask"])
    encoded, codec = [generator.backend.encode_image(planes) for planes in pixels], generator.resources.codec
    look = read_images(generator.backend, codec, generator.bundle.manifest.image_findings, encoded, context)
    assert np.allclose(look.image_embeds[0], projected.flatten(0, 1).numpy(), atol=1e-4)
    own = torch.zeros(1, dtype=torch.long)
    scores = scores_of(parts.finding_head.findings.join(*parts.finding_head.logits(output).numpy()))
    assert list(look.scores.values()) == pytest.approx(scores.tolist(), abs=1e-4)
    seen = parts.finding_head.read(output, 1, own)[0]
    prompt = encode_prompt(parts, context, seen, True)
    assert codec.encode_prompt(build_prompt(context, seen, True)) == prompt[2 * parts.model.config.num_query_tokens :]
