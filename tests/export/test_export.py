import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import IN_INT8, call_cli, run_cli
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from cbedge import OutputError, ReportGenerator, open_bundle
from cbedge.backends import choose_variant
from cbedge.bundles.bundle import CARD
from cbedge.provenance import describe_bundle, provenance
from export.blockwise import Int4Settings, quantize_language_model
from export.half import align_head
from export.merge import MergeError, merge
from export.quantize import quantize_graphs
from export.revise import app
from training.datasets import open_studies
from training.trained import checkpoint_of, load_adapted


def test_parity_is_measured_and_fp32_writes_what_torch_writes(tiny_bundle: Path):
    parity = json.loads((tiny_bundle.parent / "parity" / "parity.json").read_text())
    assert parity["merge_error"] <= 1e-4
    assert set(parity["variants"]) == {"fp32", "fp16", "int8", "int4", "q4f16", "nf4"} | IN_INT8
    assert max(parity["variants"]["fp32"]["graph_errors"].values()) < 1e-4
    assert parity["variants"]["fp32"]["token_agreement"] == 1
    assert parity["fp32_equal"] == parity["fp32_cases"] > 0
    sizes = {name: variant["megabytes"] for name, variant in parity["variants"].items()}
    assert sizes["fp32"] > sizes["fp16"] > sizes["q4f16"] and sizes["fp32"] > max(sizes["int8"], sizes["int4"])
    for variant in parity["variants"].values():
        assert 0 < variant["token_agreement"] <= 1 and max(variant["graph_errors"].values()) < 0.5
        assert variant["relative_errors"]["decoder_model_merged"] < 0.5
    assert parity["graph_cases"] == parity["cases"] == 4
    assert parity["bundle"] == describe_bundle(tiny_bundle) and parity["data"] == parity["source"]
    in_bundle = json.loads((tiny_bundle / "parity.json").read_text())
    assert in_bundle.items() <= parity.items()
    assert open_bundle(tiny_bundle).manifest.quality["parity"] == in_bundle


def test_a_bundle_is_revised_and_its_graphs_stay(tiny_bundle: Path, tmp_path: Path):
    openings, quality = tmp_path / "openings.yaml", tmp_path / "quality.json"
    openings.write_text("effusion: There is a pleural effusion.\n")
    quality.write_text(json.dumps({"protocol": "as measured", "scores": {"ours": {"CIDEr": 0.5}}}))
    out = tmp_path / "revised"

    def revise(target: Path, *arguments: object) -> str:
        words = [str(word) for word in (tiny_bundle, "--out", target, *arguments)]
        return CliRunner().invoke(app, words, catch_exceptions=False).stdout

    revise(out, "--version", "9.9", "--openings", openings, "--quality", quality)
    before, after = open_bundle(tiny_bundle).manifest, open_bundle(out).manifest
    open_bundle(out).verify()
    assert after.version == "9.9"
    assert after.image_findings.open(("effusion",)) == {"effusion": "There is a pleural effusion."}
    assert {n: f for n, f in after.files.items() if n != CARD} == {n: f for n, f in before.files.items() if n != CARD}
    card = (out / CARD).read_text()
    assert "as measured" in card and "| ours | 0.500 |" in card and "starts with a fixed sentence" in card
    assert after.quality["parity"] == before.quality["parity"]
    assert "earlier state" not in card
    for sha256, earlier in ((describe_bundle(tiny_bundle)["sha256"], False), ("0" * 64, True)):
        record = provenance("films", tiny_bundle) | {"protocol": "", "scores": {"ours": {"CIDEr": 0.5}}}
        record["bundle"]["sha256"] = sha256
        quality.write_text(json.dumps(record))
        revise(out, "--quality", quality, "--force")
        card = (out / CARD).read_text()
        assert ("earlier state of this bundle" in card) is earlier and f"SHA-256 {sha256[:12]}…" in card
    small = tmp_path / "small"
    revise(small, "--keep", "int8")
    kept = open_bundle(small)
    kept.verify()
    assert [*kept.manifest.variants] == ["int8"] == [kept.manifest.default_variant]
    assert {f.name for f in small.glob("*.onnx*")} == {f.name for f in tiny_bundle.glob("*_int8.onnx*")}
    assert (small / "tokenizer.json").is_file()
    openings.write_text("spleen: The spleen is large.\n")
    with pytest.raises(ValueError, match="'spleen'"):
        revise(tmp_path / "other", "--openings", openings)
    assert not (tmp_path / "other").exists()
    with pytest.raises(OutputError, match="--force"):
        revise(out)


def test_a_phrasebook_of_the_models_own_drafts_saves_passes_and_changes_no_word(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path
):
    done = call_cli(
        "export.revise", tiny_bundle, "--out", tmp_path / "b", "--phrases", tiny_data, "--phrase-studies", 5
    )
    assert done.returncode == 0, done.stderr
    assert "10 of 10 drafts" in done.stderr
    open_bundle(tmp_path / "b").verify()
    studies = open_studies(tiny_data, ("train",), 5)
    before, after = (
        [
            generator.generate(study.image, indication=study.context.indication, accept_any_image=True)
            for generator in [ReportGenerator.from_pretrained(bundle, device="cpu")]
            for study in studies
        ]
        for bundle in (tiny_bundle, tmp_path / "b")
    )
    assert [report.text for report in before] == [report.text for report in after]
    assert sum(report.passes for report in after) <= sum(report.passes for report in before)
    refused = call_cli("export.revise", tiny_bundle, "--out", tmp_path / "c", "--phrases", tmp_path)
    assert refused.returncode == 1 and str(tmp_path) in refused.stderr and not (tmp_path / "c").exists()


def test_int4_graphs_hold_four_and_eight_bit_weights(tiny_bundle: Path):
    decoder = onnx.load(str(tiny_bundle / "decoder_model_merged_q4.onnx"), load_external_data=False)
    kinds = [node.op_type for node in decoder.graph.node]
    assert "MatMulNBits" in kinds and "MatMul" not in kinds
    fp32, int4 = ((tiny_bundle / f"decoder_model_merged{s}.onnx_data").stat().st_size for s in ("", "_q4"))
    assert int4 < fp32 / 2  # in a model as small as this, scales weigh
    told = {"decoder_model_merged": {4, 8}, "qformer": {4, 8}, "vision_encoder": {8}}
    for kind, bits in told.items():
        graph = onnx.load(str(tiny_bundle / f"{kind}_q4.onnx"), load_external_data=False).graph
        found = {a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
        assert found == bits
    words = onnx.load(str(tiny_bundle / "qformer_q4.onnx")).graph.node
    narrow = {n.output[0] for n in words if n.op_type == "MatMulNBits" and n.name.endswith("_Q4")}
    layers = [name for n in words if narrow & {*n.input} for name in n.input if name.endswith(".bias")]
    assert layers and all("query" not in name and "attention" not in name for name in layers)
    assert not any("layer.1" in name for name in layers), "the last layer's, which nothing reads"
    names = [node.name for node in decoder.graph.node if node.op_type == "MatMulNBits" and "/attn/" in node.name]
    assert names and all(name.endswith("_Q4") for name in names)  # GPTQ, with adapters too: the head alone keeps 8 bits


def test_the_vision_encoder_rounds_no_activation(tiny_bundle: Path):
    nodes = onnx.load(str(tiny_bundle / "vision_encoder_q4.onnx")).graph.node
    found = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
    assert found and all(values.get("accuracy_level", 0) == 0 and values["bits"] == 8 for values in found)


def test_merging_refuses_what_changes_the_model(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    from export import merge as module

    parts = load_adapted(checkpoint_of(tiny_run), [tiny_run], tiny_run)

    def spoil(parts):
        parts.model.language_model.get_output_embeddings().weight.data += 0.1

    monkeypatch.setattr(module, "merge_adapters", spoil)
    with pytest.raises(MergeError, match="differ from unmerged"):
        merge(parts)


def test_a_tied_embedding_is_stored_once_and_read_right(tmp_path: Path):
    """The head's quantized weights serve the embedding graph too, and give the same rows within 4 bits."""
    words, width = 1024, 64
    table = np.random.default_rng(0).standard_normal((words, width)).astype(np.float32)
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT

    def save(name: str, node: onnx.NodeProto, inputs: list, outputs: list, weight: np.ndarray) -> Path:
        graph = helper.make_graph([node], name, inputs, outputs, [onnx.numpy_helper.from_array(weight, "w")])
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
        return path

    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, "n"])
    rows = helper.make_tensor_value_info("inputs_embeds", float32, [1, "n", width])
    x, y = (helper.make_tensor_value_info(n, float32, [1, "n", s]) for n, s in (("x", width), ("y", words)))
    embed = save(
        "embed_tokens", helper.make_node("Gather", ["w", "input_ids"], ["inputs_embeds"]), [ids], [rows], table
    )
    head = helper.make_node("MatMul", ["x", "w"], ["y"], name="/lm_head/MatMul")
    paths = {
        "embed_tokens": embed,
        **{
            kind: save(kind, head, [x], [y], np.ascontiguousarray(table.T))
            for kind in ("vision_encoder", "qformer", "decoder_model_merged")
        },
    }
    (tmp_path / "q").mkdir()
    written = quantize_graphs(paths, tmp_path / "q")
    import onnxruntime

    assert written["embed_tokens"].stat().st_size < 2000
    session = onnxruntime.InferenceSession(str(written["embed_tokens"]))
    rows = session.run(None, {"input_ids": np.arange(words)[None]})[0][0]
    assert np.abs(rows - table).max() <= np.abs(table).max() / 8 + 1e-6


@pytest.mark.slow
def test_the_terminal_shows_a_line_a_step_and_a_table(tiny_checkpoint: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    done = run_cli("export", "--checkpoint", tiny_checkpoint, "--out", out, "--variant", "int4", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    shown = "".join(done.stdout.split())  # a long path is wrapped
    steps = ["loaded", "merged", "traced", "quantized", "checked", "packed"]
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines] == steps, done.stderr
    assert all(re.search(r"\d\.\d s( +\d+\.\d MB)?$", line) for line in lines)
    assert f"{out}," in shown and "int4 *" in done.stdout and "* default" in done.stdout


def test_graphs_hold_no_file_names_of_the_machine(tiny_bundle: Path):
    for path in tiny_bundle.glob("*.onnx"):
        assert b"stack_trace" not in path.read_bytes(), path.name


def test_export_is_atomic_and_never_overwrites_unasked(tiny_run: Path, tiny_bundle: Path, tmp_path: Path):
    done = call_cli("export", "--checkpoint", checkpoint_of(tiny_run), "--adapters", tiny_run, "--out", tiny_bundle)
    assert done.returncode == 1 and "--force" in done.stderr and "Traceback" not in done.stderr
    done = call_cli("export", "--checkpoint", tmp_path / "none", "--out", tmp_path / "bundle")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    done = call_cli(
        "export", "--checkpoint", checkpoint_of(tiny_run), "--variant", "int3", "--out", tmp_path / "bundle"
    )
    assert done.returncode == 1 and "int4" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_language_model_that_was_not_trained_on_is_taken_as_it_is(tiny_bundle: Path, tmp_path: Path):
    restored, out = tmp_path / "restored", tmp_path / "out"
    assert call_cli("export.restore", tiny_bundle, "--variant", "int4", "--out", restored).returncode == 0
    done = call_cli(
        "export", "--checkpoint", restored, "--language-from", tiny_bundle, "--variant", "int4", "--out", out
    )
    assert done.returncode == 0, done.stderr
    for name in ("decoder_model_merged_q4.onnx", "decoder_model_merged_q4.onnx_data", "embed_tokens_q4.onnx"):
        assert (out / name).read_bytes() == (tiny_bundle / name).read_bytes()
    refused = call_cli(
        "export", "--checkpoint", restored, "--language-from", tiny_bundle, "--variant", "fp16", "--out", tmp_path / "h"
    )
    assert refused.returncode and "int8 or int4" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "h").exists()


def test_a_gpu_gets_a_decoder_in_16_bits_on_the_same_weights(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cpu, both = tmp_path / "cpu", tmp_path / "both"
    assert call_cli("export.revise", tiny_bundle, "--out", cpu, "--keep", "int4").returncode == 0
    done = call_cli("export.revise", cpu, "--out", both, "--gpu")
    assert done.returncode == 0, done.stderr
    added = {f.name for f in both.iterdir()} - {f.name for f in cpu.iterdir()}
    assert added == {"decoder_model_merged_q4f16.onnx"} and (both / next(iter(added))).stat().st_size < 200_000
    exact, half = (ReportGenerator.from_pretrained(both, name, "cpu") for name in ("int4", "q4f16"))
    embeds = np.random.default_rng(0).standard_normal((1, 6, exact.bundle.manifest.shapes.hidden_size))
    logits = []
    for generator in (exact, half):
        decoder = generator.backend.new_decoder(12)
        logits.append([decoder.prefill(embeds), decoder.append([5, 6, 7])[2].copy()])
    assert np.corrcoef(np.ravel(logits[0]), np.ravel(logits[1]))[0, 1] > 0.999
    monkeypatch.setattr("cbedge.backends.registry.choose_device", lambda name: "cuda")
    assert choose_variant(exact.bundle) == ("q4f16", "cuda") and exact.bundle.variant()[0] == "int4"
    assert choose_variant(exact.bundle, "int4") == choose_variant(open_bundle(cpu)) == ("int4", "cpu")
    for folder, reason in ((both, "has q4f16 already"), (tmp_path / "int8", "has no int4")):
        if folder.name == "int8":
            assert call_cli("export.revise", tiny_bundle, "--out", folder, "--keep", "int8").returncode == 0
        refused = call_cli("export.revise", folder, "--out", tmp_path / "other", "--gpu")
        assert refused.returncode and reason in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("kept", "variant", "device"), [("int4", "int4", "cpu"), ("q4f16", "q4f16", "cuda"), ("fp32", "fp32", "cpu")]
)
def test_with_a_gpu_a_variant_for_gpus_is_chosen_and_another_runs_on_the_cpu(
    kept: str, variant: str, device: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert call_cli("export.revise", tiny_bundle, "--out", tmp_path / "b", "--keep", kept).returncode == 0
    monkeypatch.setattr("cbedge.backends.registry.choose_device", lambda name: "cuda" if name == "auto" else name)
    opened = []

    def open_it(bundle, chosen, where, threads):
        opened.append((next(n for n, v in bundle.manifest.variants.items() if v == chosen), where))
        raise RuntimeError

    monkeypatch.setattr("cbedge.api.open_backend", open_it)
    with pytest.raises(RuntimeError):
        ReportGenerator.from_pretrained(tmp_path / "b")
    assert opened == [(variant, device)]


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_added_to_a_head_for_the_gpu_change_no_logit(bits: int):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 70)).astype(np.float32)
    node = helper.make_node("MatMul", ["hidden", "lm_head.weight"], ["logits"], name="/lm_head/MatMul")
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "n", w]) for n, w in (("hidden", 64), ("logits", 70))
    ]
    graph = helper.make_graph(
        [node], "head", values[:1], values[1:], [numpy_helper.from_array(weight, "lm_head.weight")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    quantized = quantize_language_model(model, Int4Settings(eight_bits="lm_head" if bits == 8 else "$^"))
    hidden = {"hidden": rng.standard_normal((1, 3, 64)).astype(np.float32)}
    before = run_graph(quantized, hidden)
    align_head(quantized)
    assert any(a.i == 128 for n in quantized.graph.node for a in n.attribute if a.name == "N")
    after = run_graph(quantized, hidden)
    assert after.shape == (1, 3, 70) and np.allclose(before, after, atol=1e-4)


def run_graph(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[
        0
    ]


def test_the_card_states_origin_licences_limits_and_what_was_not_measured(tiny_bundle: Path):
    card = (tiny_bundle / "MODEL_CARD.md").read_text()
    for words in ("Unreviewed draft", "research use", "Base weights", "Not measured", "Parity with torch", "Limits"):
        assert words in card


def test_manifest_card_and_command_name_the_data_as_the_run_recorded_them(tiny_bundle: Path):
    (data,) = json.loads((tiny_bundle / "manifest.json").read_text())["training_data"]
    assert data["name"].startswith("unnamed data at ") and data["tags"] == "given"
    assert data["splits"] == "train 12, val 4" and len(data["study_list_sha256"]) == 64
    card = (tiny_bundle / "MODEL_CARD.md").read_text()
    assert data["name"] in card and data["study_list_sha256"] in card
    assert "IU X-RAY" not in card.split("## Measured quality")[0] and "American" not in card
    shown = call_cli("cbedge.cli.main", "model", "--model", tiny_bundle).stdout
    assert f"trained on {data['name']} (not stated)" in shown


def test_the_merged_model_is_plain_again(tiny_run: Path):
    parts = load_adapted(checkpoint_of(tiny_run), [tiny_run], tiny_run)
    assert merge(parts) <= 1e-4
    assert not any("lora" in name for name, _ in parts.model.named_parameters())
    assert isinstance(parts.model.query_tokens, torch.Tensor)


@pytest.mark.slow
def test_graphs_too_large_for_one_file_keep_their_weights_beside_them(
    tiny_run: Path,
    tiny_bundle: Path,
    tiny_data: Path,
    chest_png: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from export import tracing

    monkeypatch.setattr(tracing, "LARGEST_GRAPH", 20_000)
    out = tmp_path / "large"
    done = call_cli(
        "export",
        "--checkpoint",
        checkpoint_of(tiny_run),
        "--adapters",
        tiny_run,
        "--out",
        out,
        "--data",
        tiny_data,
        "--variant",
        "fp32",
        "--variant",
        "fp16",
        "--variant",
        "int8",
    )
    assert done.returncode == 0, done.stderr
    kinds = ("vision_encoder", "qformer", "embed_tokens", "decoder_model_merged")
    assert all((out / f"{kind}.onnx_data").is_file() for kind in kinds)
    bundle = open_bundle(out)
    bundle.verify()
    for variant in ("fp32", "fp16", "int8"):
        large, small = (
            ReportGenerator.from_pretrained(folder, variant, "cpu").generate(chest_png, max_new_tokens=6)
            for folder in (out, tiny_bundle)
        )
        assert large.text == small.text
