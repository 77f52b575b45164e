import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import USUAL_VARIANT, call_cli

from cbedge import ReportGenerator, bench, bench_report
from cbedge.images.radiograph import load_radiograph
from cbedge.provenance import describe_bundle


def run_bench(bundle: Path, *arguments: object):
    return call_cli("cbedge.cli", "bench", "--model", bundle, "--device", "cpu", "--tokens", 6, *arguments)


@pytest.fixture(scope="module")
def record(tiny_bundle: Path, chest_png: Path) -> dict:
    images = [load_radiograph(chest_png), bench.drawn_chest()]
    settings = bench.BenchSettings(tiny_bundle, ["int4", "fp32"], "cpu", tokens=60, warm_up=1, repeat=2)
    return bench.bench(images, settings)


def test_a_record_holds_every_stage_of_every_variant(record: dict):
    assert [row["variant"] for row in record["variants"]] == ["int4", "fp32"]
    for row in record["variants"]:
        assert row["drafts"] == 4 and row["new_tokens"] <= 60
        medians = {name: spread["median"] for name, spread in row["ms"].items()}
        assert set(medians) == {*bench_report.STAGES, "first token"}
        assert max(v for k, v in medians.items() if k != "total") <= medians["total"]
        for spread in row["ms"].values():
            assert spread["least"] <= spread["median"] <= spread["p95"] <= spread["p99"] <= spread["most"]
        assert row["redraft_ms"]["median"] > 0
        assert 0 < row["bandwidth_share"] < 2 and row["peak_memory_mb"] > 10 and row["tokens_per_pass"] >= 1
    small, large = (row["bytes_per_pass"] for row in record["variants"])
    assert small < large


def test_what_a_draft_leaves_out_again_was_decoded_all_the_same(tiny_bundle: Path):
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu", recent_studies=0)
    manifest = generator.bundle.manifest
    findings = manifest.image_findings
    assert findings is not None
    count = len(findings.names)
    seeing = replace(findings, thresholds=(0.0,) * count, openings=("It is there.",) * count, denials=((".",),) * count)
    generator.bundle = replace(generator.bundle, manifest=replace(manifest, image_findings=seeing))
    report = generator.generate(bench.drawn_chest(), max_new_tokens=60)
    assert report.new_tokens < report.opening_tokens and report.passes > 0  # what was said twice is left out
    row = bench._row(generator, [report], load=0.0, bandwidth=1e9)
    assert row["tokens_per_pass"] >= 1 and row["tokens_per_second"]["median"] > 0


@pytest.mark.parametrize("form", bench_report.FORMATS)
def test_every_format_shows_stages_and_compares_with_an_older_record(record: dict, form: str):
    text = bench_report.render(record, form, before=record)
    assert "prefill" in text and "int4" in text
    if form == "json":
        assert json.loads(text) == json.loads(json.dumps(record))
    else:
        assert "1.00 x before" in text
    if form == "csv":
        assert len({len(row) for row in csv.reader(io.StringIO(text))}) == 1


def test_one_radiograph_and_one_draft_are_in_the_singular(record: dict):
    assert "median of 1 radiograph x 1 draft. " in bench_report.render({**record, "images": 1, "repeat": 1}, "md")
    assert "median of 2 radiographs x 3 drafts. " in bench_report.render({**record, "images": 2, "repeat": 3}, "md")


def test_the_command_writes_a_record_a_plot_and_cold_starts(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ("--image", chest_png, "--repeat", 1, "--cold", 1, "--format", "json", "-o", out, "--plot", png)
    done = run_bench(tiny_bundle, *arguments)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["cold"]["variant"] == written["variants"][0]["variant"] == USUAL_VARIANT
    assert written["cold"]["first_token_s"] <= written["cold"]["command_s"] and written["cold"]["peak_memory_mb"] > 10
    assert written["bundle"] == describe_bundle(tiny_bundle) and written["data"] == "radiographs: 1"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert str(chest_png.parent) not in out.read_text()
    again = run_bench(tiny_bundle, *arguments)
    assert again.returncode != 0 and "--force" in again.stderr
    compared = run_bench(tiny_bundle, "--repeat", 1, "--compare", out, "--format", "md")
    assert compared.returncode == 0 and "x before" in compared.stdout


def test_what_cannot_be_measured_is_refused_in_one_line(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text("hello")
    for arguments, reason in (
        (("--image", tmp_path), "note.txt is not a supported image"),
        (("--format", "xml"), "unknown format 'xml'"),
        (("--variants", "int3"), "unknown variant 'int3'"),
        (("--compare", tmp_path / "note.txt"), "not written"),
        (("--image", tmp_path / "none"), "no such file"),
    ):
        done = run_bench(tiny_bundle, *arguments)
        assert done.returncode != 0 and reason in done.stderr and "Traceback" not in done.stderr, arguments
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_without_files_is_refused_and_no_drawn_film_measured_instead(tiny_bundle: Path, tmp_path: Path):
    done = run_bench(tiny_bundle, "--image", tmp_path)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("cbedge: no radiograph in ") and done.stderr.count("\n") == 1
