import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

from cbedge import Report, ReportGenerator
from cbedge.backends import registry
from cbedge.backends.ort_decoder import OnnxDecoder
from cbedge.backends.provider import Provider
from cbedge.outputs import FORMATS, Format, render

RUN = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_imports_follow_the_contracts():
    linter = pytest.importorskip("importlinter", reason="import-linter is not installed")
    assert linter
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout


def test_a_generator_has_few_public_members():
    names = [name for name, _ in inspect.getmembers(ReportGenerator) if not name.startswith("_")]
    assert names == [
        "decoding",
        "from_pretrained",
        "generate",
        "generate_async",
        "generate_many",
        "keep_to",
        "reads_lateral",
        "stream",
    ]


@pytest.fixture(scope="module")
def report() -> Report:
    return ReportGenerator.from_pretrained(device="cpu", variant="int4").generate(EXAMPLES / "chest_pa.png")


def test_a_new_format_is_one_file_and_one_entry(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shout.py").write_text("def write(report, source):\n    return report.impression.upper().encode()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FORMATS, "shout", Format("shout:write", "text/plain", ".txt"))
    assert render(report, "shout") == report.impression.upper().encode()
    from cbedge.services.http_form import form_schema

    assert "shout" in str(form_schema())


def test_a_new_provider_is_one_file_and_one_entry(report: Report, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    mine = Provider(
        "mine", "CPUExecutionProvider", OnnxDecoder, "not built", "no start", prepare=lambda: told.append("up")
    )
    monkeypatch.setitem(registry.PROVIDERS, "mine", mine)
    monkeypatch.setattr(registry, "DEVICES", (*registry.DEVICES, "mine"))
    generator = ReportGenerator.from_pretrained(device="mine", variant="int4")
    again = generator.generate(EXAMPLES / "chest_pa.png")
    assert told == ["up"] and (again.device, again.text) == ("mine", report.text)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("cbedge.generator", "ReportGenerator", "cbedge.api"),
        ("cbedge.radiograph", "load_radiograph", "cbedge.images.radiograph"),
        ("cbedge.formats", "render", "cbedge.outputs"),
        ("cbedge.bundle", "open_bundle", "cbedge.bundles.bundle"),
        ("cbedge.bundle", "Manifest", "cbedge.bundles.manifest"),
        ("cbedge.preprocess", "Preprocessing", "cbedge.images.preprocess"),
        ("cbedge.heatmap", "overlay", "cbedge.images.heatmap"),
        ("cbedge.batch", "run_batch", "cbedge.services.batch"),
        ("cbedge.image_findings", "ImageFindings", "cbedge.findings.image_findings"),
        ("cbedge.templates", "parse_template", "cbedge.drafting.template_parser"),
    ],
)
def test_an_old_module_name_works_and_warns(old: str, name: str, new: str):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated: use {new}"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)


def test_an_old_attribute_of_a_generator_works_and_warns():
    generator = ReportGenerator.from_pretrained(device="cpu", variant="int4")
    with pytest.warns(DeprecationWarning, match="resources.phrasebook"):
        assert generator.phrasebook is generator.resources.phrasebook
    with pytest.raises(AttributeError, match="no attribute 'phrases'"):
        _ = generator.phrases
