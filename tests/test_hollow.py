import json
from pathlib import Path

from conftest import call_cli

from cbedge import ReportGenerator, open_bundle


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_bundle_without_its_weights_gets_random_ones_and_drafts(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    whole, hollow = tmp_path / "whole", tmp_path / "hollow"
    done = call_cli("export.revise", tiny_bundle, "--out", whole, "--keep", "int4", "--keep", "q4f16")
    assert done.returncode == 0, done.stderr
    assert run("empty", whole, hollow).returncode == 0
    assert size(hollow) < size(whole) / 2 and not list(hollow.glob("*.onnx_data"))
    assert run("fill", hollow).returncode == 0
    bundle = open_bundle(hollow)
    bundle.verify()
    assert abs(size(hollow) - size(whole)) < 0.02 * size(whole)
    for variant in bundle.manifest.variants:
        generator = ReportGenerator.from_pretrained(hollow, variant, "cpu")
        report = generator.generate(chest_png, max_new_tokens=200, accept_any_image=True)
        assert report.finding_scores
    refused = run("empty", whole, hollow)
    assert refused.returncode == 1 and "exists already" in refused.stderr


def run(*arguments: object):
    return call_cli("benchmarks.hollow", *arguments)


def test_stages_and_passes_are_timed(tiny_bundle: Path):
    done = call_cli("benchmarks.passes", "--bundle", tiny_bundle, "--device", "cpu", "--prompt", 6, "--runs", 2)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wanted = ["vision", "qformer", "prefill of 6", *(f"pass over {count}" for count in (1, 2, 5, 9, 17, 33))]
    assert [*told["ms"]] == wanted and all(ms > 0 for ms in told["ms"].values()) and told["device"] == "cpu"
