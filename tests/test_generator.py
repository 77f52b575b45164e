import json
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, needs_default_model
from PIL import Image

from cbedge import BundleError, ContextError, DeviceError, RadiographError, ReportGenerator, load_radiograph
from cbedge.backends import onnx as backend


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, device="cpu")


def test_the_same_radiograph_gives_the_same_draft(generator: ReportGenerator, chest_png: Path):
    first = generator.generate(chest_png, indication="cough", max_new_tokens=12)
    again = generator.generate(Image.open(chest_png), indication="cough", max_new_tokens=12)
    assert first.text == again.text
    assert first.new_tokens <= 12 and first.prompt_tokens > 20
    assert first.model == "tiny" and first.variant == "int4" and first.device == "cpu"
    assert "draft" in first.statement


def test_the_stream_is_the_report(generator: ReportGenerator, chest_png: Path):
    stream = generator.stream(chest_png, max_new_tokens=12)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.report
    assert "".join(stream).strip() == stream.report.text == generator.generate(chest_png, max_new_tokens=12).text


def test_stages_add_up_to_the_whole(generator: ReportGenerator, chest_png: Path):
    t = generator.generate(load_radiograph(chest_png), max_new_tokens=4).timings
    assert t.read + t.vision + t.qformer + t.prefill + t.decode == pytest.approx(t.total)
    assert min(t.vision, t.qformer, t.prefill, t.decode) > 0


def test_json_holds_what_an_integrator_needs(generator: ReportGenerator, chest_png: Path):
    told = json.loads(generator.generate(chest_png, max_new_tokens=4).to_json())
    assert {"findings", "impression", "model", "model_version", "variant", "device", "image_sha256", "prompt_tokens",
            "new_tokens", "timings_ms", "statement", "complete"} <= set(told)  # fmt: skip
    assert set(told["timings_ms"]) == {"read", "vision", "qformer", "prefill", "decode", "total"}


def test_bad_input_is_refused_before_the_model_runs(generator: ReportGenerator, chest_png: Path, tmp_path: Path):
    with pytest.raises(RadiographError, match="no such file"):
        generator.stream(tmp_path / "none.png")
    with pytest.raises(ContextError, match="indication is empty"):
        generator.stream(chest_png, indication=" ")
    with pytest.raises(ContextError, match="max_new_tokens"):
        generator.stream(chest_png, max_new_tokens=0)


def test_fp32_and_int4_of_one_bundle_both_run(tiny_bundle: Path, chest_png: Path):
    exact = ReportGenerator.from_pretrained(tiny_bundle, variant="fp32", device="cpu")
    assert exact.generate(chest_png, max_new_tokens=4).variant == "fp32"
    with pytest.raises(BundleError, match="unknown variant"):
        ReportGenerator.from_pretrained(tiny_bundle, variant="int3")


def test_cuda_is_never_replaced_silently(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built for CUDA")
    with pytest.raises(DeviceError, match=r"cbedge\[gpu\]"):
        ReportGenerator.from_pretrained(tiny_bundle, device="cuda")
    with pytest.raises(DeviceError, match="auto, cpu, cuda"):
        ReportGenerator.from_pretrained(tiny_bundle, device="tpu")
    # A CUDA build whose libraries do not load gives a session on the CPU: that is refused too.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(DeviceError, match="nvidia-smi"):
        ReportGenerator.from_pretrained(tiny_bundle, device="cuda")


@pytest.mark.parametrize(
    ("installed", "told"), [((), "not installed"), (("onnxruntime", "onnxruntime-gpu"), "both installed")]
)
def test_exactly_one_onnx_runtime_is_wanted(installed: tuple, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_installed", lambda name: name in installed)
    with pytest.raises(DeviceError, match=told) as caught:
        backend.check_runtime()
    assert "pip install" in str(caught.value)


@needs_default_model
def test_the_embedded_model_drafts_a_report_of_the_example():
    generator = ReportGenerator.from_pretrained(device="cpu")
    report = generator.generate(EXAMPLES / "chest_pa.png", indication="cough")
    assert report.complete
    assert len(report.findings.split()) >= 8 and report.impression
    assert "XXX" not in report.text and "<|" not in report.text


@needs_default_model
def test_the_embedded_model_answers_without_priors_and_to_noise():
    generator = ReportGenerator.from_pretrained(device="cpu")
    assert generator.generate(EXAMPLES / "chest_pa.png").findings
    noise = np.random.default_rng(0).random((300, 300)).astype(np.float32)
    assert isinstance(generator.generate(noise, max_new_tokens=8).text, str)
