from pathlib import Path

import numpy as np
import pytest

from cbedge import open_bundle
from export.blockwise import Int4Settings, quantize_language_model
from export.gptq import calibration_inputs, round_language_model, round_weight
from export.graph_weights import Graph
from export.quantize import round_for
from export.restore import restore
from export.tracing import DECODER
from export.tune import divergence, tune_scales
from training.drafting import TorchDrafter


def correlated(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Inputs of a layer: few directions hold most of their power, as in a language model."""
    return rng.standard_normal((count, 8)) @ rng.standard_normal((8, width)) * 3 + rng.standard_normal((count, width))


@pytest.mark.parametrize("block", [32, 64])
def test_outputs_of_a_rounded_weight_are_nearer_than_those_of_nearest_rounding(block: int):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 192)).astype(np.float32)
    inputs, unseen = correlated(rng, 2000, 192), None
    inputs, unseen = inputs[:1000], inputs[1000:]
    found = round_weight(weight, inputs.T @ inputs, block)
    assert found.values.min() >= 0 and found.values.max() <= 15 and found.scales.shape == (48, 192 // block)
    nearest = round_weight(weight, np.eye(192), block)  # inputs that have nothing in common: each column for itself
    errors = [np.linalg.norm(unseen @ (r.weight - weight).T) for r in (found, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_a_weight_without_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="multiple of the block size"):
        round_weight(np.ones((4, 40), np.float32), np.eye(40), 32)


def test_the_decoder_holds_the_rounded_weights(tiny_bundle: Path, tiny_data: Path):
    bundle = open_bundle(tiny_bundle)
    parts = restore(bundle, "fp32")
    before = {n: p.clone() for n, p in parts.model.language_model.named_parameters()}
    settings = Int4Settings(block_size=32, eight_bits="lm_head|down_proj", algorithm="gptq")
    rounded = round_for(parts, tiny_data, settings)
    assert all((p == before[n]).all() for n, p in parts.model.language_model.named_parameters())
    assert len(rounded) == 2 * 4
    source = tiny_bundle / bundle.manifest.variants["fp32"].graphs[DECODER]
    written = quantize_language_model(source, settings, rounded).graph
    graph = Graph([*written.node], {t.name: t for t in written.initializer}, tiny_bundle)
    bits = {}
    for node in graph.nodes:
        if node.op_type == "MatMulNBits":
            name = node.name[: -len("_Q4")]
            bits[name] = int(node.name[-1])
            if name in rounded:
                assert np.array_equal(graph.linear(node), rounded[name].weight)
    assert {n for n, b in bits.items() if b == 4} == {*rounded}
    with pytest.raises(ValueError, match="gptq"):
        quantize_language_model(source, settings)


def test_tuned_scales_bring_the_rounded_model_nearer_to_the_one_in_fp32(tiny_bundle: Path, tiny_data: Path):
    parts = restore(open_bundle(tiny_bundle), "fp32")
    model = parts.model.language_model
    for name, weight in model.named_parameters():  # a random model's tokens are all alike: sharpen them
        if "norm" not in name:
            weight.data *= 4
    before = {n: p.clone() for n, p in model.named_parameters()}
    readings = calibration_inputs(parts, tiny_data)
    rounded = round_language_model(model, readings, 32, lambda name: "lm_head" not in name)
    told: list[float] = []
    tuned = tune_scales(model, rounded, readings, 30, tell=lambda step, steps, nats: told.append(nats))
    assert len(told) == 30
    assert divergence(model, tuned, readings) < 0.7 * divergence(model, rounded, readings)
    assert all((p == before[n]).all() for n, p in model.named_parameters())
    for name, found in tuned.items():
        assert np.array_equal(found.values, rounded[name].values)
        assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    assert not any("forward" in vars(module) for module in model.modules())


def test_calibration_reads_the_models_own_drafts(tiny_bundle: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch):
    parts = restore(open_bundle(tiny_bundle), "fp32")
    table = parts.model.get_input_embeddings().weight
    drafts = [f"FINDINGS: Draft {i}." for i in range(3)]  # a random model's own are no text
    monkeypatch.setattr(TorchDrafter, "draft", lambda self, requests, progress: drafts[: len(requests)])
    for reading, draft in zip(calibration_inputs(parts, tiny_data, 3), drafts, strict=True):
        ids = [int((table - row).abs().sum(1).argmin()) for row in reading.embeds[0, reading.report :]]
        assert parts.tokenizer.decode(ids, skip_special_tokens=True).strip() == draft
