"""What a user reads on standard error, with the exit code, when a command line cannot be carried out."""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import DEFAULT_BUNDLE, EXAMPLES, call_cli, needs_default_model
from golden.drafts import FOLDER, TEMPLATE
from PIL import Image
from syrupy.assertion import SnapshotAssertion
from tokenizers import Tokenizer

from cbedge import errors

CODES = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
MODEL = "--variant int4 --device cpu"
WITHOUT_MODEL = f"""
generate missing.png
generate .
generate empty.png
generate text.png
generate small.png
generate blank.png
generate cut.dcm
generate mr.dcm
generate film.jpg --lateral missing.png
generate film.jpg --view sideways
generate film.jpg --indication {"x" * 1001}
generate film.jpg --temperature 9
generate film.jpg --top-p 0
generate film.jpg --beams 2 --temperature 1
generate film.jpg --no-repeat -1
generate film.jpg --stop-bias 99
generate film.jpg --template missing.txt
generate film.jpg --template .
generate film.jpg --template latin1.txt
generate film.jpg --template blanks.txt
generate film.jpg --template impression.txt
generate film.jpg --template template.txt --no-template
generate film.jpg --model missing
generate film.jpg --model damaged
generate film.jpg --model future
generate film.jpg --model prompt
generate film.jpg --model incomplete --variant int4
generate film.jpg --variant int3
generate film.jpg --device tpu
generate film.jpg --format pdf
generate film.jpg --format text --json
generate film.jpg --output film.jpg
generate film.jpg --output template.txt
generate film.jpg --output missing/draft.txt
generate film.jpg --output .
generate film.jpg --output draft.png --heatmap draft.png
generate film.jpg --output draft.png --heatmap folder/../draft.png
generate film.jpg --output draft.png --heatmap DRAFT.png
generate film.jpg --output missing/
generate film.jpg --output folder/
generate film.jpg --output -
generate film.jpg --temperature nan
batch missing --out drafts.jsonl
batch text.png --out text.png
batch no-image.csv --out drafts.jsonl
batch unknown-column.csv --out drafts.jsonl
batch twice.csv --out drafts.jsonl
batch empty-cell.csv --out drafts.jsonl
batch film.jpg --out film.jpg
batch film.jpg --out drafts.jsonl --parquet drafts.jsonl
batch film.jpg --out drafts.jsonl --parquet folder/../Drafts.jsonl
batch film.jpg --out missing/
batch film.jpg --out -
bench --format pdf
bench --compare template.txt
bench --image missing.png
bench --output bench.png --plot folder/../bench.png
serve --host 0.0.0.0
serve --token short
serve --deadline inf
serve --idle nan
listen --known PACS --spool spool --peer PACS
listen --known PACS --spool spool --peer PACS@host:²
listen --known PACS --spool spool --peer PÄCS@host:104
listen --known A\\B --spool spool
listen --known  --spool spool
listen --known PACS --spool spool --aet SEVENTEEN_LETTERS
listen --known PACS --spool spool --pair-wait inf
listen --known PACS --spool spool --retry nan
model --model missing
model --model altered --card
doctor --model missing
""".strip().splitlines()
WITH_MODEL = f"""
generate noise.png {MODEL}
generate film.jpg {MODEL} --max-new-tokens 0
generate film.jpg {MODEL} --lateral film.jpg
generate film.jpg {MODEL} --view lateral --lateral other.jpg
generate other.jpg {MODEL} --no-template --model wordless
generate film.jpg {MODEL} --format sr --output draft.dcm
batch folder --out drafts.jsonl {MODEL}
batch film.jpg --out template.txt {MODEL}
""".strip().splitlines()
WITHOUT_PACKAGE = {
    "highdicom": "generate film.jpg --format sr --output draft.dcm",
    "fhir": "generate film.jpg --format fhir",
    "fastapi": "serve",
    "pynetdicom": "listen --known PACS --spool spool",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the command lines name."""
    folder = tmp_path_factory.mktemp("messages")
    films = FOLDER / "films"
    shutil.copy(films / "00003523_013.jpg", folder / "film.jpg")
    shutil.copy(films / "00002117_005.jpg", folder / "other.jpg")
    for name, pixels in {
        "small.png": np.arange(64, dtype=np.uint8).reshape(8, 8),
        "blank.png": np.full((300, 300), 7, np.uint8),
        "noise.png": np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8),
    }.items():
        Image.fromarray(pixels).save(folder / name)
    (folder / "folder").mkdir()
    for name in ("empty.png", "folder/empty.png"):
        (folder / name).touch()
    shutil.copy(folder / "small.png", folder / "folder")
    (folder / "text.png").write_text("not an image")
    content = (EXAMPLES / "chest_pa.dcm").read_bytes()
    (folder / "cut.dcm").write_bytes(content[: len(content) // 2])
    other = pydicom.dcmread(EXAMPLES / "chest_pa.dcm")
    other.Modality = "MR"
    other.save_as(folder / "mr.dcm")
    for name, text in {
        "template.txt": TEMPLATE,
        "blanks.txt": "FINDINGS: The heart measures ___ cm.",
        "impression.txt": "IMPRESSION: Normal.",
        "no-image.csv": "id,indication\n1,cough\n",
        "unknown-column.csv": "image,age\nfilm.jpg,70\n",
        "twice.csv": "id,image\n1,film.jpg\n1,other.jpg\n",
        "empty-cell.csv": "image,indication\n,cough\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "latin1.txt").write_bytes("Kardiomegalie für Ärzte".encode("latin-1"))
    manifest = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    for name, content in {
        "damaged": "{",
        "future": json.dumps(manifest | {"format_version": 99}),
        "prompt": json.dumps(manifest | {"prompt_version": 99}),
        "incomplete": json.dumps(manifest),
        "altered": json.dumps(manifest),
    }.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(content)
    (folder / "altered" / "MODEL_CARD.md").write_text("altered")
    shutil.copytree(DEFAULT_BUNDLE, folder / "wordless")  # its drafts stop where the heading of the impression begins
    heading = Tokenizer.from_file(str(DEFAULT_BUNDLE / "tokenizer.json")).encode(" IMPRESSION:").ids[0]
    stopping = manifest | {"stop_ids": [*manifest["stop_ids"], heading]}
    (folder / "wordless" / "manifest.json").write_text(json.dumps(stopping))
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative names keep the place of the temporary folder out of the messages."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CBEDGE_TOKEN", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # the command line sets its own


def messages(lines: list[str]) -> tuple[str, set[int]]:
    """Each command line with what it prints on standard error and its exit code; and all exit codes."""
    told, codes = "", set()
    for line in lines:
        done = call_cli("cbedge.cli.main", *line.split(" "))
        assert "Traceback" not in done.stderr, done.stderr
        shown = done.stderr.replace(str(Path.cwd()), "<folder>")
        told += f"$ cbedge {line if len(line) < 100 else line[:60] + '…'}\n{shown}exit code {done.returncode}\n\n"
        codes.add(done.returncode)
    return told, codes


@needs_default_model
def test_messages_without_a_draft(snapshot: SnapshotAssertion):
    told, codes = messages(WITHOUT_MODEL)
    assert codes == CODES - {errors.DraftError.exit_code} | {2}  # 2: wrong option
    assert told == snapshot


@needs_default_model
def test_messages_with_a_draft(snapshot: SnapshotAssertion):
    told, codes = messages(WITH_MODEL)
    assert told == snapshot
    assert errors.DraftError.exit_code in codes


def test_messages_without_a_package(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion):
    told = ""
    for package, line in WITHOUT_PACKAGE.items():
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                patch.delitem(sys.modules, name)
            for name in ("cbedge.services.http", "cbedge.services.dicom_node"):
                patch.delitem(sys.modules, name, raising=False)
            patch.setitem(sys.modules, package, None)
            told += f"without {package}:\n{messages([line])[0]}"
    assert told == snapshot
