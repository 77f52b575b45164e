import json
from pathlib import Path

from conftest import run_cli


def test_a_record_holds_every_stage_cold_start_and_memory(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    stem = tmp_path / "latency"
    arguments = (
        "benchmarks",
        chest_png,
        "--model",
        tiny_bundle,
        "--limit",
        3,
        "--cold",
        1,
        "--tokens",
        6,
        "--output",
        stem,
    )
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(stem.with_suffix(".json").read_text())
    spans = record["warm"]["ms"]
    assert record["warm"]["drafts"] == 3 and record["warm"]["new_tokens"] <= 6
    assert spans["total"]["median"] >= max(s["median"] for name, s in spans.items() if name != "total") > 0
    assert record["cold"]["until_first_token_s"]["median"] <= record["cold"]["whole_command_s"]["median"]
    assert record["cold"]["peak_memory_mb"] > 10
    assert "| decode |" in stem.with_suffix(".md").read_text()
    again = run_cli(*arguments)
    assert again.returncode == 1 and "--force" in again.stderr


def test_an_unusable_image_is_told_before_anything_is_measured(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text("hello")
    done = run_cli("benchmarks", tmp_path, "--model", tiny_bundle, "--output", tmp_path / "out")
    assert done.returncode == 1 and "note.txt is not an image" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()
