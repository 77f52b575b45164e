import json
import shutil
from pathlib import Path

import pytest
from conftest import call_cli

from cbedge import ReportGenerator, doctor
from cbedge.backends import provider as backend
from cbedge.backends.ort_cuda import CUDA
from cbedge.bundles.bundle import open_bundle
from cbedge.errors import BundleError, DeviceError


def test_a_sound_machine_is_called_so(tiny_bundle: Path):
    done = call_cli("cbedge.cli", "doctor", "--model", tiny_bundle)
    assert done.returncode == 0, done.stdout
    assert "ok      draft on cpu" in done.stdout and "fault" not in done.stdout


def test_json_names_every_check(tiny_bundle: Path):
    checks = json.loads(call_cli("cbedge.cli", "doctor", "--model", tiny_bundle, "--json").stdout)
    names = {check["name"] for check in checks}
    assert {"python", "onnxruntime", "memory", "disk", "model", "draft on cpu"} <= names
    assert all(check["state"] in ("ok", "warning", "fault") for check in checks)


def test_an_altered_model_is_a_fault_with_a_remedy(tiny_bundle: Path, tmp_path: Path):
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with open(tmp_path / "bundle" / "tokenizer.json", "a") as file:
        file.write(" ")
    done = call_cli("cbedge.cli", "doctor", "--model", tmp_path / "bundle")
    assert done.returncode == 1 and "fault   model: tokenizer.json" in done.stdout
    assert "install or export it again" in done.stdout and "Traceback" not in done.stderr


def test_two_builds_of_the_runtime_are_a_fault(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "is_installed", lambda name: True)
    checks = {check.name: check for check in doctor.examine(tiny_bundle)}
    assert checks["onnxruntime"].state == "fault" and "pip uninstall" in checks["onnxruntime"].found
    assert "draft on cpu" not in checks


def test_a_missing_model_is_told(tmp_path: Path):
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path)
    assert checks["model"].state == "fault" and checks["model"].found == str(caught.value)


def test_an_error_message_is_shown_whole(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **options: object) -> None:
        raise DeviceError(CUDA.failure)

    monkeypatch.setattr(ReportGenerator, "from_pretrained", fail)
    (row,) = (check for check in doctor.examine(tiny_bundle) if check.name == "draft on cpu")
    assert (row.found, row.remedy) == (CUDA.failure, "")
