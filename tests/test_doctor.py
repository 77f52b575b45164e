import json
import shutil
from pathlib import Path

import pytest
from conftest import run_cli

from cbedge import doctor
from cbedge.backends import provider as backend


def test_a_sound_machine_is_called_so(tiny_bundle: Path):
    done = run_cli("cbedge.cli", "doctor", "--model", tiny_bundle)
    assert done.returncode == 0, done.stdout
    assert "ok      draft on cpu" in done.stdout and "fault" not in done.stdout


def test_json_names_every_check(tiny_bundle: Path):
    checks = json.loads(run_cli("cbedge.cli", "doctor", "--model", tiny_bundle, "--json").stdout)
    names = {check["name"] for check in checks}
    assert {"python", "onnxruntime", "memory", "disk", "model", "draft on cpu"} <= names
    assert all(check["state"] in ("ok", "warning", "fault") for check in checks)


def test_an_altered_model_is_a_fault_with_a_remedy(tiny_bundle: Path, tmp_path: Path):
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with open(tmp_path / "bundle" / "tokenizer.json", "a") as file:
        file.write(" ")
    done = run_cli("cbedge.cli", "doctor", "--model", tmp_path / "bundle")
    assert done.returncode == 1 and "fault   model: tokenizer.json" in done.stdout
    assert "to do: install or export it again" in done.stdout and "Traceback" not in done.stderr


def test_two_builds_of_the_runtime_are_a_fault(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "is_installed", lambda name: True)
    checks = {check.name: check for check in doctor.examine(tiny_bundle)}
    assert checks["onnxruntime"].state == "fault" and "pip uninstall" in checks["onnxruntime"].remedy
    assert "draft on cpu" not in checks


def test_a_missing_model_is_told(tmp_path: Path):
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    assert checks["model"].state == "fault" and checks["model"].remedy
