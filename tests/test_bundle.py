import json
import shutil
from pathlib import Path

import pytest
from conftest import IN_INT8

from cbedge import BundleError, OutputError, open_bundle
from cbedge.bundles.bundle import write_bundle


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_exported_bundle_opens_and_verifies(tiny_bundle: Path):
    bundle = open_bundle(tiny_bundle)
    bundle.verify()
    assert bundle.variant()[0] == "int4"
    assert set(bundle.manifest.variants) == {"int4", "fp32", "fp16", "int8", "q4f16", "nf4"} | IN_INT8
    assert {p.name for p in tiny_bundle.iterdir()} == {*bundle.manifest.files, "manifest.json"}


def test_an_altered_file_is_named(copy: Path):
    data = bytearray((copy / "tokenizer.json").read_bytes())
    data[100] ^= 1
    (copy / "tokenizer.json").write_bytes(data)
    with pytest.raises(BundleError, match=r"tokenizer\.json .* altered"):
        open_bundle(copy).verify()


def test_a_missing_file_is_named(copy: Path):
    (copy / "qformer_q4.onnx").unlink()
    with pytest.raises(BundleError, match=r"qformer_q4\.onnx is missing"):
        open_bundle(copy).verify()


def test_an_unknown_variant_is_told_with_those_that_exist(tiny_bundle: Path):
    with pytest.raises(BundleError, match=r"unknown variant 'int2'.*int4, fp32, fp16"):
        open_bundle(tiny_bundle).variant("int2")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format_version": 99}, "format 99"),
        ({"prompt_version": 99}, "prompt version 99"),
        ({"shapes": {}}, "not valid"),
        ({"files": {"../evil": {"size": 1, "sha256": ""}}}, "not a plain name"),
        ({"default_variant": "none"}, "no variant"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(copy: Path, values: dict, told: str):
    edit_manifest(copy, **values)
    with pytest.raises(BundleError, match=told):
        open_bundle(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(copy: Path, content: str):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError):
        open_bundle(copy)


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="no model bundle"):
        open_bundle(tmp_path)


def test_writing_refuses_to_overwrite_and_leaves_nothing_half_done(copy: Path, tmp_path: Path):
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        write_bundle(copy, lambda folder: pytest.fail("must not be called"))

    def fail(folder: Path):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(copy, fail, force=True)
    assert (copy / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_of_the_users_own_is_never_replaced(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="not a bundle"):
        write_bundle(tmp_path / "mine", lambda folder: pytest.fail("must not be called"), force=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_force_replaces_a_bundle(copy: Path, tmp_path: Path):
    manifest = open_bundle(copy).manifest

    def fill(folder: Path):
        (folder / "only.txt").write_text("new")
        return manifest

    assert set(write_bundle(copy, fill, force=True).manifest.files) == {"only.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
