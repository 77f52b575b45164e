import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from export.graphs import ExportError
from export.layers import app
from training.trained import checkpoint_of

HEAD_SIZE = 16  # of the tiny language model


def answer(path: Path) -> np.ndarray:
    """Logits of a decoder for a fixed prompt, float32 [1, 6, V]."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feed[node.name] = np.zeros((1, node.shape[1], 0, HEAD_SIZE), np.float32)
    hidden = next(node.shape[2] for node in session.get_inputs() if node.name == "inputs_embeds")
    feed |= {"inputs_embeds": rng.standard_normal((1, 6, hidden)).astype(np.float32),
             "attention_mask": np.ones((1, 6), np.int64), "num_logits": np.array([6], np.int64)}  # fmt: skip
    return session.run(["logits"], feed)[0]


def test_a_decoder_written_layer_by_layer_says_what_the_whole_one_says(
    tiny_run: Path, tiny_bundle: Path, tmp_path: Path
):
    done = CliRunner().invoke(app, [
        "--checkpoint", checkpoint_of(tiny_run), "--adapters", str(tiny_run), "--out", str(tmp_path / "out"),
        "--variant", "int4", "--at-once", "1",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert "layers 1 to 1 of 2" in done.stderr and told["megabytes"] > 0
    path = tmp_path / "out" / "decoder_model_merged_q4.onnx"
    whole, parts = answer(tiny_bundle / path.name), answer(path)
    assert np.allclose(parts, whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize(("variant", "told"), [("int4", "no config.json"), ("int2", "unknown variant 'int2'")])
def test_what_cannot_be_exported_is_told_and_nothing_is_written(tmp_path: Path, variant: str, told: str):
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), "--variant", variant]
    with pytest.raises(ExportError, match=told):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
