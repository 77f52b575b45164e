import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cbedge.bundles.bundle import CARD
from cbedge.provenance import bundle_sha256, command_line, commit, describe_bundle, provenance


def _git(folder: Path, *words: str) -> str:
    user = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(("git", *user, *words), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_says_whether_files_were_changed(tmp_path: Path):
    assert commit(tmp_path) == "unknown"
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-q", "-m", "first")
    whole = _git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == whole[:12]
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{whole[:12]}-dirty"


def test_a_package_inside_another_repository_does_not_take_its_commit(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") == "unknown"


def test_the_hash_of_a_bundle_follows_its_files_and_not_its_measured_quality(tiny_bundle: Path, tmp_path: Path):
    def changed(change) -> str:  # type: ignore[no-untyped-def]
        values = json.loads((tiny_bundle / "manifest.json").read_text())
        change(values)
        (tmp_path / "manifest.json").write_text(json.dumps(values))
        return bundle_sha256(tmp_path)

    same = bundle_sha256(tiny_bundle)
    assert len(same) == 64 and describe_bundle(tiny_bundle)["sha256"] == same
    assert changed(lambda values: None) == same
    assert changed(lambda values: values.update(quality={"scores": {"a": 1}})) == same
    assert changed(lambda values: values["files"][CARD].update(sha256="0" * 64)) == same
    assert changed(lambda values: values["files"]["tokenizer.json"].update(sha256="0" * 64)) != same
    assert changed(lambda values: values.update(decoding={"max_new_tokens": 7})) != same


def test_a_command_line_has_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    words = ["--data", "/home/ann/iu_xray", "--external=nih=/home/ann/nih", "--output", "out/a", "--limit", "3", "../x"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/cbedge", *words])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command_line() == "cbedge --data iu_xray --external=nih=nih --output out/a --limit 3 x"


def test_every_record_names_what_was_measured_with_what():
    record = provenance("IU X-RAY, test", packages=("numpy", "no-such-package"))
    assert list(record) == ["command", "commit", "bundle", "data", "versions", "machine"]
    assert record["data"] == "IU X-RAY, test" and list(record["versions"]) == ["numpy"]
    assert record["bundle"]["name"] == "cbedge-mini-iu-xray" and record["machine"]["date"]
    assert provenance("drawn films", bundle=False)["bundle"] is None
