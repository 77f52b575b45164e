from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEFAULT_BUNDLE
from typer.testing import CliRunner

from cbedge import ReportGenerator, open_bundle
from cbedge.drafting.query import read_images
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext, build_prompt
from export.restore import RestoreError, app
from training.base import ModelAndTokenizers, load_model
from training.batches import encode_instructions, encode_prompt
from training.config import load_config
from training.stages import embed_inputs, encode_images, query_image
from training.train import run

pytestmark = pytest.mark.slow

CONTEXT = ClinicalContext("cough", view="frontal")


def restored(bundle: Path, out: Path, *arguments: str) -> ModelAndTokenizers:
    done = CliRunner().invoke(app, [str(bundle), "--out", str(out), *arguments], catch_exceptions=False)
    assert done.exit_code == 0 and str(out) in done.stdout
    parts = load_model(str(out), out)
    parts.model.eval()
    return parts


@torch.inference_mode()
def relative_errors(parts: ModelAndTokenizers, generator: ReportGenerator, image: Path) -> dict[str, float]:
    """How far the bundle's graphs are from the restored model, each given what the model gives the next."""
    pixels = preprocess_radiograph(load_radiograph(image), parts.preprocessing)
    features = encode_images(parts.model, torch.from_numpy(pixels))
    instruction = encode_instructions(parts, [CONTEXT])
    queries, projected = query_image(parts.model, features, instruction["input_ids"], instruction["attention_mask"])
    seen = parts.finding_head.read(queries)[0]
    embeds = embed_inputs(parts.model, torch.tensor([encode_prompt(parts, CONTEXT, seen)]), projected)
    logits = parts.model.language_model(inputs_embeds=embeds).logits[0, -1].numpy()
    codec, findings = generator.resources.codec, generator.bundle.manifest.image_findings
    findings = findings.head if findings else None  # those of the Q-Former
    look = read_images(generator.backend, codec, findings, [features.numpy()], CONTEXT)
    decoder = generator.backend.new_decoder(embeds.shape[1] + 1)
    ids = np.array([codec.encode_prompt(build_prompt(CONTEXT, seen))], np.int64)
    pairs = {
        "vision": (generator.backend.encode_image(pixels), features.numpy()),
        "qformer": (look.image_embeds, projected.numpy()),
        "embedding": (generator.backend.embed_tokens(ids), embeds[:, projected.shape[1] :].numpy()),
        "decoder": (decoder.prefill(np.ascontiguousarray(embeds.numpy())), logits),
    }
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in pairs.items()}


def test_a_checkpoint_comes_back_from_the_graphs_of_its_bundle(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    for variant, most in (("fp32", 1e-4), ("int4", 0.1)):
        parts = restored(tiny_bundle, tmp_path / variant, "--variant", variant)
        errors = relative_errors(parts, ReportGenerator.from_pretrained(tiny_bundle, variant, "cpu"), chest_png)
        assert max(errors.values()) < most, errors
    told = open_bundle(tiny_bundle).manifest.image_findings
    assert parts.finding_head.findings == told


def test_the_default_model_comes_back_and_is_trained_on(chest_png: Path, tiny_data: Path, tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    parts = restored(DEFAULT_BUNDLE, checkpoint)
    errors = relative_errors(parts, ReportGenerator.from_pretrained(None, None, "cpu"), chest_png)
    assert max(errors.values()) < 0.15, errors  # activations are rounded to 8 bits in the bundle
    config = tmp_path / "more.yaml"
    config.write_text(
        "stages:\n  - name: language\n    lora: {part: language, r: 2, alpha: 4, targets: [q_proj]}\n"
        "    losses: {language: 1.0}\n    tell_findings: [cardiomegaly, effusion]\n    batch_size: 2\n"
    )
    folder = run(load_config(config, base=str(checkpoint), data=tiny_data, output=tmp_path / "run"), max_steps=1)
    from training.trained import load_adapted

    head = load_adapted(str(checkpoint), [folder], tmp_path).finding_head
    assert head.findings.names == ("abnormal", "cardiomegaly", "effusion")
    assert torch.equal(head.weight, parts.finding_head.weight[:3])  # what it sees is what the checkpoint sees


def test_nothing_is_replaced_unasked_and_what_has_no_graphs_is_refused(tiny_bundle: Path, tmp_path: Path):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    with pytest.raises(RestoreError, match="--force"):
        CliRunner().invoke(app, [str(tiny_bundle), "--out", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(RestoreError, match="not a checkpoint"):
        CliRunner().invoke(app, [str(tiny_bundle), "--out", str(tmp_path), "--force"], catch_exceptions=False)
    assert kept.read_text() == "years of work"
    with pytest.raises(RestoreError, match="--variant"):
        CliRunner().invoke(
            app, [str(tiny_bundle), "--out", str(tmp_path / "new"), "--variant", "nf4"], catch_exceptions=False
        )
    assert not (tmp_path / "new").exists()
