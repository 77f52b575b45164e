"""An InstructBLIP with Flan-T5: trained, merged, exported, and run as every other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cbedge import ReportGenerator
from cbedge.backends import open_backend
from cbedge.bundles.bundle import open_bundle
from cbedge.decoding import Decoding
from tests.conftest import IN_INT8, call_cli, save_tiny
from training.controls import own
from training.datasets.iu_xray import read_studies
from training.drafting import Drafter, TorchDrafter
from training.run_bundle import ReportResources
from training.trained import checkpoint_of, load_adapted

pytestmark = pytest.mark.slow

RUN = """
base: {base}
data: data
output: runs/tiny
stages:
  - name: vision
    train: [qformer, query_tokens, projection]
    lora: {{part: vision, r: 4, alpha: 8, targets: [qkv, projection, fc1, fc2]}}
    losses: {{language: 1.0, tags: 1.0}}
    batch_size: 4
    epochs: 2
  - name: language
    train: [projection]
    lora: {{part: language, r: 4, alpha: 8, targets: [q, v, wi_0, wo]}}
    losses: {{language: 1.0}}
    tell_findings: [cardiomegaly, effusion, opacity]
    batch_size: 4
    epochs: 2
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("flan-t5")
    base, config, run, out = (folder / name for name in ("base", "run.yaml", "run", "bundle"))
    config.write_text(RUN.format(base=save_tiny(base, flan_t5=True)), encoding="utf-8")
    done = call_cli("training", "run", "--config", config, "--data", tiny_data, "--output", run, "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    done = call_cli(
        "export",
        "--checkpoint",
        checkpoint_of(run),
        "--adapters",
        run,
        "--out",
        out,
        "--name",
        "tiny-t5",
        "--variant",
        "fp32",
        "--variant",
        "all",
        "--data",
        tiny_data,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_graphs_write_what_torch_writes(bundle: Path) -> None:
    parity = json.loads((bundle / "parity.json").read_text())
    assert parity["merge_error"] < 1e-4
    assert parity["fp32_equal"] == parity["fp32_cases"] > 0
    exact = parity["variants"]["fp32"]
    assert exact["token_agreement"] == 1
    assert max(exact["relative_errors"].values()) < 1e-4
    # 16 bits do not hold what Flan-T5 computes.
    assert {"fp32", "int8", "int4", "nf4"} | IN_INT8 == {*parity["variants"]}


def test_a_pass_over_many_tokens_says_what_single_ones_say(bundle: Path) -> None:
    opened = open_bundle(bundle)
    backend = open_backend(opened, opened.variant("fp32")[1], "cpu", 2)
    embeds = np.random.default_rng(0).standard_normal((1, 30, 64)).astype(np.float32)
    together, alone = backend.new_decoder(80), backend.new_decoder(80)
    assert np.array_equal(together.prefill(embeds), alone.prefill(embeds))
    rows = together.append([5, 9, 7, 8]).copy()
    each = [alone.append([token])[-1].copy() for token in (5, 9, 7, 8)]
    assert np.allclose(rows, each, atol=1e-4)
    together.rewind(together.length - 2)  # two tokens forgotten, and read again
    assert np.allclose(together.append([7, 8]), rows[2:], atol=1e-4)
    both = alone.fork([0, 0])
    assert np.allclose(both.step([11, 12]), [alone.append([11])[0], _after(alone, 12)], atol=1e-4)


def _after(decoder, token: int) -> np.ndarray:
    decoder.rewind(decoder.length - 1)
    return decoder.append([token])[0]


@pytest.mark.parametrize("variant", sorted({"fp32", "int8", "int4", "nf4"} | IN_INT8))
def test_a_report_comes_out(bundle: Path, chest_png: Path, variant: str) -> None:
    generator = ReportGenerator.from_pretrained(bundle, variant, "cpu")
    report = generator.generate(chest_png, indication="cough", max_new_tokens=300, accept_any_image=True)
    assert 0 < report.new_tokens <= 300 and report.text.startswith("FINDINGS: ")
    assert all(sentence.text.endswith(".") and ".." not in sentence.text for sentence in report.sentences)
    assert "." not in report.text.replace(". ", " ").rstrip(".")  # a space behind every sentence


def test_a_run_drafts_letter_for_letter_what_its_bundle_drafts(bundle: Path, tiny_data: Path) -> None:
    run = bundle.parent / "run"
    parts = load_adapted(checkpoint_of(run), [run], bundle.parent)
    assert parts.finding_head is not None
    thresholds = (0.0, 0.0, 1.0, 0.0)  # no score is near one of them
    parts.finding_head = replace(
        parts.finding_head, findings=replace(parts.finding_head.findings, thresholds=thresholds)
    )
    opened = open_bundle(bundle)
    findings = replace(opened.manifest.image_findings, thresholds=thresholds)
    changed = replace(opened, manifest=replace(opened.manifest, image_findings=findings))
    generator = ReportGenerator(changed, "fp32", open_backend(changed, opened.variant("fp32")[1], "cpu", 2))
    generator.resources.templates = None
    drafters = Drafter(generator, "bundle"), TorchDrafter(parts, resources=ReportResources.learn(parts, tiny_data))
    ours, theirs = (one.draft(own(read_studies(tiny_data, ("val",))), lambda count: None) for one in drafters)
    assert theirs == ours and all(ours)


def test_guesses_change_no_token_and_beams_work(bundle: Path, chest_png: Path) -> None:
    generator = ReportGenerator.from_pretrained(bundle, "fp32", "cpu")

    def draft(**settings) -> str:
        return generator.generate(
            chest_png, max_new_tokens=24, accept_any_image=True, decoding=Decoding(**settings)
        ).text

    assert draft() == draft(speculative=False)
    assert isinstance(draft(beams=3), str)
    assert isinstance(draft(temperature=0.7, seed=1), str)


def test_sixteen_bits_and_layer_by_layer_are_refused(bundle: Path, tmp_path: Path) -> None:
    base = str(bundle.parent / "base")
    done = call_cli("export", "--checkpoint", base, "--out", tmp_path / "half", "--variant", "q4f16")
    assert done.returncode != 0
    assert "16-bit" in done.stderr
    done = call_cli("export.layers", "--checkpoint", base, "--out", tmp_path / "layers", "--variant", "int4")
    assert done.returncode != 0
    assert "not exported layer by layer" in done.stderr
    assert not any(tmp_path.iterdir())
