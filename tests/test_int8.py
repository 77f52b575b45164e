import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import IN_INT8, call_cli
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erf

from cbedge import BundleError, DeviceError, ReportGenerator, open_bundle
from cbedge.backends import choose_variant, int8, open_backend
from cbedge.backends.int8 import QuantizedLinear, Table, read_files
from export.blockwise import Int4Settings, quantize_language_model
from export.int8 import multiply_in_int8

needs_x86 = pytest.mark.skipif(not IN_INT8, reason="no x86 processor with AVX2")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4, and q4a8 on its weights, as export.revise adds it."""
    folder = tmp_path_factory.mktemp("int8")
    for source, out, *options in ((tiny_bundle, "int4", "--keep", "int4"), (folder / "int4", "both", "--vnni")):
        done = call_cli("export.revise", source, "--out", folder / out, *options)
        assert done.returncode == 0, done.stderr
    return folder / "both"


def write_probe(path: Path) -> None:
    """The graph with which ``multiplies_exactly`` tests a processor: one layer of constants with the largest value."""
    weights = numpy_helper.from_array(np.full((int8.PROBE_DEPTH, 32), 127, np.int8), "right")
    product = helper.make_node("MatMulInteger", ["left", "right"], ["products"])
    left, products = (
        helper.make_tensor_value_info(name, kind, [None, None])
        for name, kind in (("left", TensorProto.UINT8), ("products", TensorProto.INT32))
    )
    graph = helper.make_graph([product], "probe", [left], [products], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def test_a_processor_is_asked_with_a_graph_of_largest_values(tmp_path: Path):
    write_probe(tmp_path / "probe.onnx")
    assert (tmp_path / "probe.onnx").read_bytes() == int8._PROBE.read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_come_out_as_they_were_stored(bits: int, tmp_path: Path):
    rows, columns, block = 48, 80, 32  # the last block of a row is filled up
    weights = np.random.default_rng(bits).standard_normal((columns, rows)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="up_proj")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", columns), ("y", rows))
    ]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    eight = "." if bits == 8 else "$^"
    settings = Int4Settings(block_size=block, eight_bits_block_size=block, eight_bits=eight)
    onnx.save(quantize_language_model(model, settings), str(tmp_path / "g_q4.onnx"))
    multiply_in_int8(tmp_path / "g_q4.onnx", tmp_path / "g.onnx")
    table = Table.read(tmp_path / "g.json")
    (product,), files = table.products, read_files(tmp_path, table.sources)
    assert (product.rows, product.columns, product.bits) == (rows, columns, bits)
    step = np.abs(weights).max(0) / 2 ** (bits - 1)  # of a column, at most
    assert (np.abs(product.widen(files) - weights) <= step).all()
    rounded, scales = product.load(files)
    assert rounded.dtype == np.int8 and rounded.shape == (columns, rows) and np.abs(rounded).max(0).min() == 127
    assert (np.abs(rounded * scales - product.widen(files)) <= scales / 2 * 1.001).all()


def relative_error(
    nodes: list, hidden: np.ndarray, weights: np.ndarray, rows: np.ndarray, folder: Path, example: bool = False
) -> float:
    """What rounding ``hidden``, which ``nodes`` compute from the input ``rows``, changes of its product."""
    columns, outputs = weights.shape
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, k]) for n, k in (("x", columns), ("y", outputs))
    ]
    held = {"w": weights, "one": np.ones(columns, np.float32), "zero": np.zeros(columns, np.float32)}
    nodes = [*nodes, helper.make_node("MatMul", ["h", "w"], ["y"], name="product")]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    settings = Int4Settings(block_size=32, eight_bits_block_size=32, eight_bits=".")
    onnx.save(quantize_language_model(model, settings), str(folder / "g_q4.onnx"))
    multiply_in_int8(folder / "g_q4.onnx", folder / "g.onnx", rows if example else None)
    table, options = Table.read(folder / "g.json"), onnxruntime.SessionOptions()
    options.add_session_config_entry(*int8.EXACT)
    made = table.initializers(folder)
    options.add_external_initializers([*made], [*made.values()])
    found = onnxruntime.InferenceSession(str(folder / "g.onnx"), options).run(None, {"x": rows})[0]
    (product,) = table.products
    rounded, scales = product.load(read_files(folder, table.sources))
    exponents = np.array(product.exponents or [0] * columns, np.float32)
    wanted = hidden @ (rounded * scales / np.exp2(exponents)[:, None])
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@needs_x86
def test_results_of_gelu_use_all_steps(tmp_path: Path):
    """GELU's results reach from -0.17 up: half of the steps of a range around zero would be empty."""
    rng = np.random.default_rng(0)
    rows, weights = (rng.normal(size=size).astype(np.float32) for size in ((64, 256), (256, 32)))
    hidden = rows * (1 + erf(rows / np.sqrt(2))) / 2
    largest = np.abs(hidden).max(1, keepdims=True)
    error = relative_error([helper.make_node("Gelu", ["x"], ["h"])], hidden, weights, rows, tmp_path)
    around_zero = np.rint(hidden / largest * 127) * largest / 127
    assert error < 0.8 * np.linalg.norm((around_zero - hidden) @ weights) / np.linalg.norm(hidden @ weights)


@needs_x86
def test_ranges_are_measured_on_an_example(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows, weights = (rng.normal(size=size).astype(np.float32) for size in ((64, 256), (256, 32)))
    rows[:, :8] *= 10  # few channels reach much further than a LayerNorm's scale tells
    hidden = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    nodes = [helper.make_node("LayerNormalization", ["x", "one", "zero"], ["h"])]
    guessed, measured = (relative_error(nodes, hidden, weights, rows, tmp_path, example) for example in (False, True))
    assert measured < 0.7 * guessed


def test_nothing_is_stored_twice(bundle: Path):
    added = {f.name for f in bundle.iterdir()} - {f.name for f in (bundle.parent / "int4").iterdir()}
    kinds = ("vision_encoder", "qformer", "decoder_model_merged")
    assert added == {f"{kind}_q4a8.{end}" for kind in kinds for end in ("onnx", "json")}
    for name in added:
        assert (bundle / name).stat().st_size < 100_000
    variant = open_bundle(bundle).manifest.variants["q4a8"]
    for kind in kinds:
        assert {*Table.read(bundle / f"{kind}_q4a8.json").sources} <= {*variant.data}


@needs_x86
def test_graphs_compute_what_int4_computes(bundle: Path):
    opened = open_bundle(bundle)
    exact, quick = (open_backend(opened, opened.variant(name)[1], "cpu", 2) for name in ("int4", "q4a8"))
    rng = np.random.default_rng(0)
    size = opened.manifest.shapes.image_size
    pixels = rng.standard_normal((1, 3, size, size)).astype(np.float32)
    features = exact.encode_image(pixels)
    asked = [backend.query_image(features, np.array([[5, 6, 7]])) for backend in (exact, quick)]
    embeds = rng.standard_normal((1, 12, opened.manifest.shapes.hidden_size)).astype(np.float32)
    pairs = [
        (features, quick.encode_image(pixels)),
        (asked[0].embeds, asked[1].embeds),
        (exact.new_decoder(16).prefill(embeds), quick.new_decoder(16).prefill(embeds)),
    ]
    for wanted, found in pairs:
        assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    assert not np.array_equal(*pairs[-1])


def test_a_revised_bundle_is_compared_with_the_checkpoint(tiny_bundle: Path, bundle: Path, tmp_path: Path):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "compared"
    variants = [name for name in ("int4", *sorted(IN_INT8)) if name in open_bundle(bundle).manifest.variants]
    kept = [word for name in variants for word in ("--keep", name)]
    for arguments in (
        ("export.restore", tiny_bundle, "--out", checkpoint),
        ("export.revise", bundle, "--out", tmp_path / "kept", *kept),
        ("export.revise", tmp_path / "kept", "--out", out, "--parity", checkpoint),
    ):
        done = call_cli(*arguments)
        assert done.returncode == 0, done.stderr
    refused = call_cli("export.revise", bundle, "--out", tmp_path / "no", "--parity-data", tmp_path)
    assert refused.returncode == 1 and "--parity-data goes with --parity" in refused.stderr
    parity = json.loads((out / "parity.json").read_text())
    assert open_bundle(out).manifest.quality["parity"] == parity
    for name in variants:
        assert parity["variants"][name]["token_agreement"] > 0.5
        assert 0 < parity["variants"][name]["relative_errors"]["vision_encoder"] < 0.1
        assert f"| {name} |" in (out / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("variant", ["int4", *sorted(IN_INT8)])
def test_a_token_hangs_on_no_other_of_its_pass(variant: str, bundle: Path):
    opened = open_bundle(bundle)
    backend = open_backend(opened, opened.variant(variant)[1], "cpu", 2)
    embeds = np.random.default_rng(1).standard_normal((1, 9, opened.manifest.shapes.hidden_size)).astype(np.float32)
    together, alone = backend.new_decoder(40), backend.new_decoder(40)
    assert np.array_equal(together.prefill(embeds), alone.prefill(embeds))
    tokens = [9, 4, 300, 7, 7, 12]
    rows = together.append(tokens).copy()
    assert np.allclose(rows, [alone.append([token])[-1].copy() for token in tokens], rtol=0, atol=1e-6)
    assert together.length == alone.length == 9 + len(tokens)


@needs_x86
def test_it_is_taken_on_such_a_processor_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_bundle(bundle)
    assert choose_variant(opened) == ("q4a8", "cpu") and choose_variant(opened, "int4") == ("int4", "cpu")
    monkeypatch.setattr("cbedge.backends.int8.multiplies_exactly", lambda: False)
    monkeypatch.setattr("cbedge.backends.ort.multiplies_exactly", lambda: False)
    assert choose_variant(opened) == ("int4", "cpu")
    with pytest.raises(DeviceError, match="AVX2"):
        ReportGenerator.from_pretrained(bundle, "q4a8")


def test_without_such_a_processor_it_is_not_exported(monkeypatch: pytest.MonkeyPatch):
    from export.console import Steps
    from export.pipeline import choose_variants

    monkeypatch.setattr("export.pipeline.multiplies_exactly", lambda: False)
    told: list[str] = []
    monkeypatch.setattr(Steps, "note", lambda self, text: told.append(text))
    assert "q4a8" not in choose_variants(["all"], Steps()) and "q4a8 is left out" in told[0]
    with pytest.raises(ValueError, match="AVX2"):
        choose_variants(["q4a8"], Steps())


def test_it_is_added_once_and_to_int4_alone(bundle: Path, tiny_bundle: Path, tmp_path: Path):
    assert call_cli("export.revise", tiny_bundle, "--out", tmp_path / "fp32", "--keep", "fp32").returncode == 0
    for folder, reason in ((bundle, "has q4a8 already"), (tmp_path / "fp32", "has no int4")):
        refused = call_cli("export.revise", folder, "--out", tmp_path / "other", "--vnni")
        assert refused.returncode and reason in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("damage", ["", "[]", '{"sources": [], "products": [{"name": "p0"}]}', "elsewhere"])
def test_a_damaged_table_is_told(damage: str, bundle: Path, tmp_path: Path):
    path = tmp_path / "qformer_q4a8.json"
    shutil.copyfile(bundle / path.name, path)
    text = path.read_text()
    path.write_text(text.replace('"qformer_q4.onnx"', '"../qformer.onnx"', 1) if damage == "elsewhere" else damage)
    with pytest.raises(BundleError, match=r"qformer_q4a8\.json"):
        Table.read(path)


@needs_x86
def test_files_that_are_not_verified_are_not_read(bundle: Path):
    opened = open_bundle(bundle)
    variant = opened.variant("q4a8")[1]
    fewer = replace(variant, data=tuple(name for name in variant.data if name != "qformer_q4.onnx"))
    with pytest.raises(BundleError, match=r"qformer_q4a8\.json refers to files"):
        open_backend(opened, fewer, "cpu", 1)


def test_a_file_that_is_too_short_is_told(bundle: Path, tmp_path: Path):
    table = Table.read(bundle / "qformer_q4a8.json")
    (tmp_path / table.sources[0]).write_bytes(b"short")
    with pytest.raises(BundleError, match=r"does not contain p0"):
        table.initializers(tmp_path)


def test_a_table_is_read_as_it_was_written(tmp_path: Path):
    products = (
        QuantizedLinear("p0", "a", 1, 2, 16, 3, 4, 4, 32, (0, -1, 2, 7)),
        QuantizedLinear("p1", "a", 1, 2, 32, 3, 4, 8, 32, (), "b"),
    )
    Table(("a", "b"), products).save(tmp_path / "t.json")
    assert Table.read(tmp_path / "t.json") == Table(("a", "b"), products)
    assert len(json.loads((tmp_path / "t.json").read_text())["products"]) == 2
