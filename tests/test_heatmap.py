from pathlib import Path

import numpy as np
import pytest
from conftest import call_cli
from PIL import Image

from cbedge import ReportGenerator, load_radiograph
from cbedge.images.heatmap import CAVEAT, overlay, scaled_map


def test_attention_covers_the_patches_and_is_a_share_of_one(tiny_bundle: Path, chest_png: Path):
    stream = ReportGenerator.from_pretrained(tiny_bundle, device="cpu").stream(chest_png, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="image was not read yet"):
        _ = stream.attention
    assert "".join(stream) is not None
    assert stream.attention.shape == (4, 4) and (stream.attention >= 0).all()
    assert 0 < stream.attention.sum() <= 1.001


def test_the_overlay_is_brightest_where_most_was_looked(chest_png: Path):
    attention = np.zeros((4, 4), np.float32)
    attention[1, 3] = 0.5
    radiograph = load_radiograph(chest_png)
    image = np.asarray(overlay(radiograph, attention), np.int32)
    assert image.shape == (*radiograph.pixels.shape, 3)
    colour = image[..., 0] - image[..., 2]  # grey has none
    rows, columns = colour.shape
    top = np.unravel_index(colour.argmax(), colour.shape)
    assert rows // 4 <= top[0] < rows // 2 and top[1] >= 3 * columns // 4
    assert colour[3 * rows // 4 :].max() < 20
    assert scaled_map(np.full((4, 4), 0.1), (8, 8)).max() <= 1


def test_the_command_writes_a_png_with_its_caveat(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    target = tmp_path / "map.png"
    arguments = ("generate", chest_png, "--model", tiny_bundle, "--device", "cpu", "--max-new-tokens", 2)
    done = call_cli("cbedge.cli", *arguments, "--heatmap", target)
    assert done.returncode == 0 and CAVEAT in done.stderr
    assert Image.open(target).text["Comment"] == CAVEAT
    again = call_cli("cbedge.cli", *arguments, "--heatmap", target)
    assert again.returncode == 7 and "--force" in again.stderr
