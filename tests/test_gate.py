from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, call_cli, needs_default_model
from PIL import Image

from cbedge import BundleError, RadiographError, ReportGenerator
from cbedge.images.gate import Gate, pooled


def known(rng: np.random.Generator, count: int) -> np.ndarray:
    """Features of "radiographs": few directions vary much, the rest little."""
    strong = rng.standard_normal((count, 4)) @ np.eye(4, 40) * 5
    return (10 + strong + 0.1 * rng.standard_normal((count, 40))).astype(np.float32)


@pytest.fixture
def gate() -> Gate:
    from export import gate as fitting

    rng = np.random.default_rng(0)
    fitting_directions, fitting.DIRECTIONS = fitting.DIRECTIONS, 6
    try:
        made = fitting._distribution(known(rng, 400))
    finally:
        fitting.DIRECTIONS = fitting_directions
    made.limit = float(np.quantile([made.unlikeness(row) for row in known(rng, 200)], 0.99)) * 1.2
    return made


def test_what_is_like_the_known_passes_and_what_is_not_does_not(gate: Gate):
    rng = np.random.default_rng(1)
    scores = np.array([gate.unlikeness(row) for row in known(rng, 300)])
    assert np.mean(scores) == pytest.approx(1, abs=0.25) and np.mean(scores > gate.limit) < 0.03
    shifted = known(rng, 50) + np.where(np.arange(40) == 30, 3, 0)  # outside the main directions
    far = known(rng, 50) + np.where(np.arange(40) == 1, 60, 0)  # far along one
    assert all(gate.unlikeness(row) > gate.limit for row in (*shifted, *far))


def test_a_gate_is_saved_and_read_again(gate: Gate, tmp_path: Path):
    gate.save(tmp_path / "gate.npy")
    again = Gate.load(tmp_path / "gate.npy")
    row = known(np.random.default_rng(2), 1)[0]
    assert again.unlikeness(row) == pytest.approx(gate.unlikeness(row), rel=1e-4)
    assert again.limit == pytest.approx(gate.limit)
    (tmp_path / "gate.npy").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="not a gate"):
        Gate.load(tmp_path / "gate.npy")


def test_pooling_keeps_class_token_and_mean_of_patches():
    features = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    assert pooled(features).tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]


@needs_default_model
@pytest.mark.parametrize("name", ["chest_pa.png", "chest_pa.dcm"])
def test_the_example_radiograph_passes(name: str):
    report = ReportGenerator.from_pretrained(device="cpu").generate(EXAMPLES / name)
    assert report.complete and report.findings


@needs_default_model
@pytest.mark.parametrize("kind", ["noise", "gradient", "colour", "text"])
def test_what_is_no_radiograph_is_refused_and_drafted_only_when_told(kind: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    if kind == "noise":
        pixels = rng.integers(0, 255, (300, 300)).astype(np.uint8)
    elif kind == "gradient":
        pixels = np.tile(np.linspace(0, 255, 300), (300, 1)).astype(np.uint8)
    elif kind == "text":
        pixels = np.full((300, 300), 255, np.uint8)
        pixels[40:260:20, 30:270] = np.where(rng.random((11, 240)) < 0.5, 0, 255)
    else:
        pixels = rng.integers(0, 255, (300, 300, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    generator = ReportGenerator.from_pretrained(device="cpu")
    with pytest.raises(RadiographError, match="accept_any_image"):
        generator.generate(tmp_path / "x.png")
    assert generator.generate(tmp_path / "x.png", accept_any_image=True).findings


@needs_default_model
def test_the_command_refuses_in_one_line_and_goes_on_when_told(tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300)).astype(np.uint8)).save(tmp_path / "x.png")
    refused = call_cli("cbedge.cli", "generate", tmp_path / "x.png")
    assert refused.returncode == 3 and len(refused.stderr.strip().splitlines()) == 1 and not refused.stdout
    assert call_cli("cbedge.cli", "generate", tmp_path / "x.png", "--accept-any-image").returncode == 0
