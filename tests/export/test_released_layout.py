"""A checkpoint in InstructBLIP's released layout does here what it does in transformers."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.drawn_studies import draw_films
from benchmarks.equality import PROMPTS, Equality, compare, measure
from benchmarks.equality_answers import Reference, in_torch
from benchmarks.released_layout import FAMILIES, write_released
from cbedge import ReportGenerator
from cbedge.bundles.bundle import open_bundle
from cbedge.decoding import decode
from cbedge.drafting.query import read_images
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext, build_prompt, build_query_instruction
from export.restore import restore
from training.base import load_model
from training.batches import encode_instructions, encode_prompt

pytestmark = pytest.mark.slow

SIZES = {"vicuna": (112, 14), "flan-t5": (96, 16)}
CONTEXT = ClinicalContext("cough and fever", view="frontal")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw_films(tmp_path_factory.mktemp("films"))[1:3]  # wide and grey in JPEG, coloured in PNG


@pytest.fixture(scope="module", params=FAMILIES)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, films: list[Path]
) -> tuple[str, Path, list[Equality]]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, [*measure(folder, request.param, films, *SIZES[request.param])]


def test_checkpoint_run_and_bundle_equal_transformers(measured: tuple[str, Path, list[Equality]]):
    rows = measured[2]
    assert len(rows) == 6
    for row in rows:
        assert row.pixel_values <= 1 / 255, row
        assert row.ids == row.cases, row
        if "int4" in row.model:  # within what quantization loses
            assert row.features < 0.02 and row.image_embeds < 0.1 and row.logits < 0.7, row
            continue
        assert max(row.features, row.queried or 0, row.image_embeds, row.logits) < 1e-3, row
        assert row.first_token == row.tokens == row.cases, row


def test_the_prompts_of_drafts_are_what_transformers_makes_of_their_text(
    measured: tuple[str, Path, list[Equality]], films: list[Path]
):
    family, folder, _ = measured
    reference = Reference(folder / "base")
    count = reference.model.config.num_query_tokens
    generator = ReportGenerator.from_pretrained(folder / "untrained-bundle", "fp32", "cpu")
    parts = load_model(str(folder / "base"), folder)
    theirs = reference.processor(text=build_prompt(CONTEXT), images=Image.open(films[0]), return_tensors="pt")
    instruction = reference.processor(text=build_query_instruction(CONTEXT), return_tensors="pt")["qformer_input_ids"]
    ids = theirs["input_ids"][0].tolist()
    assert (
        encode_prompt(parts, CONTEXT) == ids
        and generator.resources.codec.encode_prompt(build_prompt(CONTEXT, None)) == ids[count:]
    )
    assert (ids[count], ids[-1]) == ((2, ids[-1]) if family == "vicuna" else (ids[count], 1))
    assert torch.equal(encode_instructions(parts, [CONTEXT])["input_ids"], instruction)
    written = reference.model.generate(
        pixel_values=theirs["pixel_values"],
        qformer_input_ids=instruction,
        input_ids=theirs["input_ids"],
        max_new_tokens=32,
        do_sample=False,
    )[0].tolist()
    backend, manifest = generator.backend, generator.bundle.manifest
    pixels = preprocess_radiograph(load_radiograph(films[0]), manifest.preprocessing)
    codec, findings = generator.resources.codec, generator.bundle.manifest.image_findings
    look = read_images(backend, codec, findings, [backend.encode_image(pixels)], CONTEXT)
    prompt = backend.embed_tokens(np.array([codec.encode_prompt(build_prompt(CONTEXT, look.findings))], np.int64))
    embeds = np.concatenate([look.image_embeds, prompt], axis=1)
    decoder = backend.new_decoder(embeds.shape[1] + 33)
    tokens = [token.id for token in decode(decoder, decoder.prefill(embeds), manifest.stop_ids, 32)]
    assert tokens == written[-len(tokens) :] and len(tokens) > 1


def test_the_heat_map_has_the_vision_encoders_patches(measured: tuple[str, Path, list[Equality]], films: list[Path]):
    family, folder, _ = measured
    size, patch = SIZES[family]
    generator = ReportGenerator.from_pretrained(folder / "trained-bundle", "fp32", "cpu")
    stream = generator.stream(films[0], accept_any_image=True, max_new_tokens=4)
    next(stream, None)
    assert stream.attention.shape == (size // patch, size // patch)
    card = (folder / "trained-bundle" / "MODEL_CARD.md").read_text()
    assert f"{size} x {size} pixels" in card and "224" not in card


def test_a_trained_stage_keeps_the_checkpoints_settings(measured: tuple[str, Path, list[Equality]]):
    _, folder, _ = measured
    expected = load_model(str(folder / "base"), folder).preprocessing
    assert expected.resize_dtype == "uint8" and expected.mean[0] == 0.48145466
    for place in ("trained/language", "merged"):
        assert (folder / place / "preprocessor_config.json").is_file()
    assert asdict(open_bundle(folder / "trained-bundle").manifest.preprocessing) == asdict(expected)


def test_a_restored_bundle_keeps_settings_and_special_tokens(
    measured: tuple[str, Path, list[Equality]], tmp_path: Path, films: list[Path]
):
    family, folder, _ = measured
    if family != "vicuna":
        pytest.skip("language models of the LLaMA family alone are restored")
    restore(open_bundle(folder / "untrained-bundle"), "fp32").save(tmp_path / "restored")
    cases = [(films[0], prompt) for prompt in PROMPTS]
    references = [Reference(folder / "base").answer(*case) for case in cases]
    parts = load_model(str(tmp_path / "restored"), tmp_path)
    row = compare("restored", references, [in_torch(parts, *case) for case in cases])
    assert row.ids == row.tokens == row.cases and row.logits < 1e-3 and row.pixel_values <= 1 / 255, row


@pytest.mark.parametrize("layout", ["early", "transformers-5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_layouts_equal_transformers_too(family: str, layout: str, tmp_path: Path, films: list[Path]):
    base = write_released(tmp_path / "base", family, layout, *SIZES[family])
    cases = [(film, prompt) for film in films for prompt in PROMPTS]
    references = [Reference(base).answer(*case) for case in cases]
    assert len({tuple(answer.tokens) for answer in references}) > 2, "image and prompt decide on the tokens"
    parts = load_model(str(base), tmp_path)
    parts.save(tmp_path / "saved")
    for folder in (base, tmp_path / "saved"):
        again = load_model(str(folder), tmp_path)
        row = compare(layout, references, [in_torch(again, *case) for case in cases])
        assert row.ids == row.tokens == row.cases and row.logits < 1e-3 and row.pixel_values <= 1 / 255, row
    saved = [Reference(tmp_path / "saved").answer(*case) for case in cases]
    assert [answer.tokens for answer in saved] == [answer.tokens for answer in references]
