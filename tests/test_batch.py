import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from conftest import EXAMPLES, ROOT, USUAL_VARIANT, call_cli, draw_chest, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cbedge import CbedgeError, OutputError, RadiographError
from cbedge.file_names import safe_name
from cbedge.files import lock_file, lock_path
from cbedge.services import batch
from cbedge.services.studies import Item, find_studies, join_views


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(draw_chest(number)).save(folder / "more" / f"{number}.png")
    (folder / "chest.dcm").write_bytes((EXAMPLES / "chest_pa.dcm").read_bytes())
    (folder / "bad.png").write_text("hello")
    (folder / "notes.txt").write_text("not an image, and not taken for one")
    return folder


def run_batch(bundle: Path, studies: object, out: Path, *options: object) -> subprocess.CompletedProcess:
    given = ("--model", bundle, "--device", "cpu", "--max-new-tokens", 6)
    return call_cli("cbedge.cli", "batch", studies, "--out", out, *given, *options)


def test_one_bad_file_stops_nothing_and_is_listed_at_the_end(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "reports.jsonl"
    done = run_batch(tiny_bundle, films, out)
    assert done.returncode == 3 and "failed: bad.png" in done.stderr and "Traceback" not in done.stderr
    lines = {line["id"]: line for line in batch.read_lines(out)}
    assert set(lines) == {"bad.png", "chest.dcm", "more/0.png", "more/1.png", "more/2.png"}
    assert lines["bad.png"]["status"] == "failed" and lines["chest.dcm"]["image_sha256"]
    before = out.read_bytes()
    again = run_batch(tiny_bundle, films, out)
    assert again.returncode == 3 and "5 already there" in again.stderr and out.read_bytes() == before
    Image.fromarray(draw_chest(9)).save(films / "bad.png")
    mended = run_batch(tiny_bundle, films, out, "--retry-failed")
    assert mended.returncode == 0, mended.stderr
    assert sorted(line["status"] for line in batch.read_lines(out)) == ["ok"] * 5


def test_a_table_gives_each_radiograph_its_context(tiny_bundle: Path, films: Path, tmp_path: Path):
    table = films / "studies.csv"
    rows = ("id,image,indication,view,lateral", "a,more/0.png,cough,PA,more/2.png", "b,more/1.png,,,")
    table.write_text("\n".join(rows), encoding="utf-8")
    items = find_studies(str(table)).items
    assert [(i.id, i.indication, i.view) for i in items] == [("a", "cough", "PA"), ("b", None, None)]
    done = run_batch(tiny_bundle, table, tmp_path / "out.jsonl")
    lines = list(batch.read_lines(tmp_path / "out.jsonl"))
    assert done.returncode == 0 and [line["id"] for line in lines] == ["a", "b"]
    assert [bool(line["lateral_sha256"]) for line in lines] == [True, False]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("file,id\nx,1\n", "no column image"),
        ("image,id\n,a\n", "has no image path"),
        ("image,id\n\n,\n", "no radiograph"),
        ("image,id\na,1\nb,1\n", "twice"),
        ("image\n", "no radiograph"),
        ("image\n\x00\n", "line 2, has a NUL character"),
        ("image,indication\na.png,cough\nb.png,fe\0ver\n", "line 3, has a NUL character"),
        ('image,indication\na.png,"cough" and fever\n', "line 2, cannot be read"),
        ("Worklist 2024,,\nimage,id\na.png,1\n", "no column image in its first line, which must name the columns"),
        ("PK\x03\x04", "is an Excel or OpenDocument workbook, not a table of text: save it as CSV (UTF-8)"),
        ('[{"image": "a.png"}]', "is JSON, not a table of text: save it as CSV (UTF-8)"),
        ('\n{"image": "a.png"}\n', "is JSON, not a table of text: save it as CSV (UTF-8)"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".xlsx", ".json", ".jsonl"])
def test_a_table_that_cannot_be_used_is_refused(content: str, reason: str, suffix: str, tmp_path: Path):
    table = tmp_path / f"t{suffix}"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(RadiographError, match=re.escape(reason)):
        find_studies(str(table))


def test_what_is_there_and_is_no_batch_is_left_alone(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "letter.txt"
    out.write_text("Dear colleague,\n")
    done = run_batch(tiny_bundle, films, out)
    assert done.returncode == 7 and "was not written by cbedge batch" in done.stderr
    assert out.read_text() == "Dear colleague,\n"
    assert run_batch(tiny_bundle, films, tmp_path / "no" / "out.jsonl").returncode == 7


def test_drafts_keep_to_a_template_and_do_not_mix_with_others(tiny_bundle: Path, films: Path, tmp_path: Path):
    out, own = tmp_path / "reports.jsonl", tmp_path / "normal.txt"
    own.write_text("The lungs are clear. The heart is normal.", encoding="utf-8")
    done = run_batch(tiny_bundle, films / "more", out, "--template", own)
    assert done.returncode == 0, done.stderr
    assert {line["template_source"] for line in batch.read_lines(out)} == {"given"}
    before = out.read_bytes()
    for options in ((), ("--template", EXAMPLES / "README.md")):
        other = run_batch(tiny_bundle, films / "more", out, *options)
        assert other.returncode in (4, 7) and out.read_bytes() == before and "Traceback" not in other.stderr


def test_another_model_does_not_mix_its_drafts_in(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "reports.jsonl"
    run_batch(tiny_bundle, films / "more", out)
    other = run_batch(tiny_bundle, films / "more", out, "--variant", "fp32")
    assert other.returncode == 7 and f"was started with tiny 0.1.0 {USUAL_VARIANT}" in other.stderr


def test_a_line_left_unfinished_is_drafted_again(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "reports.jsonl"
    run_batch(tiny_bundle, films / "more", out)
    whole = out.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    out.write_bytes(whole[: -len(last) // 2])
    done = run_batch(tiny_bundle, films / "more", out)
    assert done.returncode == 0 and "wrote 1 draft to" in done.stderr
    assert [line["id"] for line in batch.read_lines(out)] == ["0.png", "1.png", "2.png"]


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_and_repeats_nothing(tiny_bundle: Path, tmp_path: Path):
    films = tmp_path / "films"
    films.mkdir()
    for number in range(60):
        Image.fromarray(draw_chest(number, 64, 64)).save(films / f"{number:02}.png")
    out = tmp_path / "reports.jsonl"
    command = [
        sys.executable,
        "-m",
        "cbedge.cli",
        "batch",
        films,
        "--out",
        out,
        "--model",
        tiny_bundle,
        "--device",
        "cpu",
        "--max-new-tokens",
        "12",
    ]
    for attempt in range(4):
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 8 * (attempt + 1)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == sorted(os.listdir(films)) and len(ids) == len(set(ids))


def test_on_a_full_disk_it_says_so_and_goes_on_once_there_is_room(tiny_bundle: Path, tmp_path: Path, mounted: Callable):
    films = tmp_path / "films"
    films.mkdir()
    for number in range(6):
        Image.fromarray(draw_chest(number, 64, 64)).save(films / f"{number}.png")
    disk = mounted("size=64k")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(60 * 1024))
    out = disk / "reports.jsonl"
    full = run_batch(tiny_bundle, films, out)
    assert full.returncode == 7 and "No space left" in full.stderr and "Traceback" not in full.stderr
    before = len(list(batch.read_lines(out)))
    assert before < 6
    ballast.unlink()
    done = run_batch(tiny_bundle, films, out)
    assert done.returncode == 0, done.stderr
    assert sorted(line["id"] for line in batch.read_lines(out)) == sorted(os.listdir(films))


def test_a_read_only_disk_is_told_in_one_line(tiny_bundle: Path, films: Path, mounted: Callable):
    done = run_batch(tiny_bundle, films, mounted("ro") / "reports.jsonl")
    assert done.returncode == 7 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr


def write_table(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Image, Indication ,VIEW\n1.png,cough,PA\n", "utf-8"),
        ("image;indication;view\n1.png;cough;PA\n", "utf-8-sig"),
        ("image\tindication\tview\r\n1.png\tcough\tPA\r\n\r\n", "utf-16"),
        ("image,indication,view\r1.png,cough,PA\r", "utf-8"),
        ('"image", "indication", "view"\n"1.png", "cough", "PA"\n', "utf-8"),
        ("image\tindication\tview\r\n1.png\tcough\tPA\r\n", "utf-16-le"),
        ("image,indication,view\n1.png,cough,PA\n", "utf-16-be"),
        ("image,indication,view\n1.png,cough,PA\n", "utf-32"),
        ("image,indication,view\r\n1.png,cough,PA\r\n\x1a", "utf-8"),
        ("sep=|\nimage|indication|view\n1.png|cough|PA\n", "utf-8"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])  # .txt is Excel's "Unicode Text"
def test_tables_of_spreadsheet_programs_are_read(text: str, encoding: str, suffix: str, tmp_path: Path):
    (item,) = find_studies(write_table(tmp_path / f"t{suffix}", text, encoding)).items
    assert (item.image.name, item.indication, item.view) == ("1.png", "cough", "PA")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,history\n1.png,cough\n", "unknown columns ('history'); possible columns are: image, id"),
        ("image,view,View\n1.png,PA,PA\n", "column view twice"),
        ("image,indication\n1.png,a,b\n", "line 2, has 3 cells"),
        ("image,indication\n1.png\n", "line 2, has 1 cells for 2 columns: add the missing ones"),
        ("file\n1.png\n", "no column image"),
    ],
)
def test_a_table_that_would_be_misread_is_refused_by_name(text: str, told: str, tmp_path: Path):
    with pytest.raises(RadiographError, match=re.escape(told)):
        find_studies(write_table(tmp_path / "t.csv", text))


def test_a_corrected_row_is_drafted_anew_and_the_others_are_kept(tiny_bundle: Path, films: Path, tmp_path: Path):
    names = ("more/0.png", "more/1.png")
    table, out = films / "t.csv", tmp_path / "out.jsonl"
    for indication, written in (("cough", 2), ("fever", 1), ("fever", 0)):
        write_table(table, f"image,indication\n{names[0]},cough\n{names[1]},{indication}\n")
        done = run_batch(tiny_bundle, table, out)
        assert done.returncode == 0 and f"wrote {written} draft" in done.stderr, done.stderr
    assert len(out.read_text().splitlines()) == 2 and "no longer given" not in done.stderr
    write_table(table, f"image,indication\n{names[0]},cough\n")
    done = run_batch(tiny_bundle, table, out)
    assert "note: 1 earlier draft of radiographs that are no longer given were kept" in done.stderr
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize("victim", ["another film", "a lateral film", "the template", "the output"])
def test_no_document_replaces_a_file_of_the_batch(victim: str, tiny_bundle: Path, tmp_path: Path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):  # films that have the names of documents
        (folder / name).write_bytes((EXAMPLES / "chest_pa.dcm").read_bytes())
    (folder / "normal.txt").write_text("The lungs are clear. The heart is normal.")
    (folder / "out.txt").write_text("")
    names = {"another film": "b", "a lateral film": "c", "the template": "normal", "the output": "out"}
    rows = {"another film": "films/a.txt,b,\nfilms/b.txt,d,", "a lateral film": "films/a.txt,c,films/c.txt"}
    table = write_table(tmp_path / "t.csv", f"image,id,lateral\n{rows.get(victim, f'films/a.txt,{names[victim]},')}\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    options = ("--documents", folder, "--template", folder / "normal.txt", "--force")
    done = run_batch(tiny_bundle, table, folder / "out.txt", *options)
    assert done.returncode == 7 and f"{names[victim]}.txt is " in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_drafts_among_the_films_are_not_drafted_again(tiny_bundle: Path, tmp_path: Path):
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    shutil.copy(EXAMPLES / "chest_pa.dcm", tmp_path / "a.dcm")
    options = ("--documents", tmp_path / "drafts", "--format", "sr")
    for studies in (tmp_path, tmp_path, f"{tmp_path}/**/*.dcm"):
        found = find_studies(str(studies), tmp_path / "drafts")
        assert [item.image.name for item in found.items] == ["a.dcm"]
        if studies == tmp_path:
            done = run_batch(tiny_bundle, studies, tmp_path / "out.jsonl", *options)
            assert done.returncode == 0, done.stderr
    assert len(found.skipped) == 1 and (tmp_path / "drafts" / "a.sr.dcm").exists()
    assert not [*tmp_path.glob("**/*.lock")]
    with pytest.raises(RadiographError, match="--documents is the folder of the radiographs"):
        find_studies(str(tmp_path), tmp_path / "drafts" / "..")


@pytest.mark.parametrize("name", [".hidden", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
def test_hidden_and_system_folders_are_named_and_skipped(name: str, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "more" / name):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_chest(1)).save(folder / "a.png")
    found = find_studies(str(tmp_path))
    assert [item.id for item in found.items] == ["a.png"] and found.skipped == [f"more/{name}"]
    assert [item.image for item in find_studies(f"{tmp_path}/**/*.png").items] == [tmp_path / "a.png"]


def test_drafts_of_another_token_limit_are_counted_and_not_mixed_in(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    done = run_batch(tiny_bundle, films / "more", out)
    cut = sum(not line["complete"] for line in batch.read_lines(out))
    assert cut > 0 and f"note: {cut} of them w" in done.stderr and "raise --max-new-tokens" in done.stderr
    before = out.read_bytes()
    other = run_batch(tiny_bundle, films / "more", out, "--max-new-tokens", 40)
    assert other.returncode == 7 and "max new tokens 6" in other.stderr and out.read_bytes() == before


def test_a_folder_is_read_by_content_and_what_is_skipped_is_named(tmp_path: Path):
    content = (EXAMPLES / "chest_pa.dcm").read_bytes()
    for name in ("1.2.840.1", "IM0001", "x.dcm", "DICOMDIR"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "without_preamble").write_bytes(content[132:])
    (tmp_path / "notes.doc").write_text("none")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = find_studies(str(tmp_path))
    assert [item.id for item in found.items] == ["1.2.840.1", "IM0001", "without_preamble", "x.dcm"]
    assert sorted(found.skipped) == ["DICOMDIR", "loop", "notes.doc"] and not found.unreadable


def test_file_names_that_are_no_text_are_drafted_and_resumed(tiny_bundle: Path, films: Path, tmp_path: Path):
    source = films / "more" / "0.png"
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = os.fsencode(folder) + b"/thorax_\xe4\xf6.png"
    with open(odd, "wb") as file:
        file.write(source.read_bytes())
    (folder / "zwei_\u00e4.png").write_bytes(source.read_bytes())
    for env, told in (({"LC_ALL": "C"}, "wrote 2 drafts to"), ({}, "wrote 0 drafts to")):
        done = run_cli(
            "cbedge.cli",
            "batch",
            folder,
            "--out",
            tmp_path / "o.jsonl",
            "--model",
            tiny_bundle,
            "--device",
            "cpu",
            "--accept-any-image",
            "--max-new-tokens",
            "8",
            **env,
        )
        assert done.returncode == 0 and told in done.stderr, done.stderr


def test_an_output_that_ends_oddly_is_recovered(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    first = run_batch(tiny_bundle, films, out)
    whole = out.read_bytes()
    for tail in (b"\0" * 512, b"\n\n", b'{"id": "half', b"\0" * 100 + b"\n"):
        out.write_bytes(whole + tail)
        again = run_batch(tiny_bundle, films, out)
        assert again.returncode == first.returncode and "Traceback" not in again.stderr
        assert [*batch.read_lines(out)] == [json.loads(line) for line in whole.splitlines()]


def test_a_second_run_beside_changes_nothing(tiny_bundle: Path, films: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    run_batch(tiny_bundle, films, out)
    before = out.read_bytes()
    lock = lock_file(lock_path(out), "busy")
    try:
        done = run_batch(tiny_bundle, films, out, "--retry-failed")
    finally:
        lock.release()
    assert done.returncode == 7 and "another cbedge batch" in done.stderr and out.read_bytes() == before


def test_parquet_holds_the_same(tiny_bundle: Path, films: Path, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out, table = tmp_path / "reports.jsonl", tmp_path / "reports.parquet"
    assert run_batch(tiny_bundle, films / "more", out, "--parquet", table).returncode == 0
    rows = pyarrow.read_table(table).to_pylist()
    assert [row["text"] for row in rows] == [line["text"] for line in batch.read_lines(out)]


def test_each_draft_is_a_file_of_its_own_too(tiny_bundle: Path, films: Path, tmp_path: Path):
    out, documents = tmp_path / "reports.jsonl", tmp_path / "documents"
    assert run_batch(tiny_bundle, films / "more", out, "--documents", documents).returncode == 0
    lines = [*batch.read_lines(out)]
    texts = {path.stem: path.read_text() for path in documents.glob("*.txt")}
    assert {safe_name(line["id"]) for line in lines} == {*texts}
    assert all(line["impression"] in texts[safe_name(line["id"])] for line in lines)
    own = documents / "mine.txt"
    own.write_text("not of this batch")
    again = run_batch(tiny_bundle, films / "more", out, "--documents", documents)
    assert again.returncode == 0 and own.read_text() == "not of this batch"
    without = run_batch(tiny_bundle, films / "more", out)
    assert without.returncode == 7, "a finished draft would lack its document, or have one that nobody asked for"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / own.name).write_text("not of this batch")
    other = run_batch(tiny_bundle, films / "more", out, "--documents", tmp_path / "theirs")
    assert other.returncode == 7 and "already has files" in other.stderr
    taken = run_batch(tiny_bundle, films / "more", tmp_path / "other.jsonl", "--documents", documents)
    assert taken.returncode == 7 and "already has files" in taken.stderr
    assert run_batch(tiny_bundle, films / "more", out, "--format", "sr").returncode == 2


@pytest.mark.parametrize(
    ("form", "names", "documents"),
    [
        ("sr", ["a.dcm", "a.png", "b"], ["a.sr.dcm", "a.png.sr.dcm", "b.sr.dcm"]),
        ("text", ["a.dcm", "a.png"], ["a.dcm.txt", "a.png.txt"]),
        ("fhir", ["a.dcm", "a.json"], ["a.dcm.fhir.json", "a.fhir.json"]),
    ],
)
def test_documents_have_names_of_their_own(form: str, names: list[str], documents: list[str], tmp_path: Path):
    items = [Item(name, tmp_path / name) for name in names]
    files = batch.Documents(tmp_path / "drafts", form)
    assert [files.path(item).name for item in items] == documents
    files.check(items, [])
    with pytest.raises(OutputError, match="is given as two outputs"):
        files.check([*items, Item(names[0].removesuffix(".dcm"), tmp_path / "x"), Item(names[0], tmp_path / "y")], [])


def test_a_format_that_a_radiograph_cannot_have_fails_by_line(tiny_bundle: Path, films: Path, tmp_path: Path):
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    out, documents = tmp_path / "reports.jsonl", tmp_path / "documents"
    done = run_batch(tiny_bundle, films / "more", out, "--documents", documents, "--format", "sr")
    assert done.returncode == 3 and not [*documents.glob("*.dcm")] and "the others are drafted" not in done.stderr
    assert all("give the radiograph as a DICOM file" in line["error"] for line in batch.read_lines(out))


def test_the_two_views_of_a_study_become_one_item(tmp_path: Path):
    views = {"a": "PA 1.2.3", "b": "LL 1.2.3", "c": "PA 1.2.4", "d": "PA 1.2.5", "e": "AP 1.2.5", "f": "LL 1.2.5"}
    dataset = pydicom.dcmread(EXAMPLES / "chest_pa.dcm")
    for name, text in views.items():
        dataset.ViewPosition, dataset.StudyInstanceUID = text.split()
        dataset.save_as(tmp_path / f"{name}.dcm")
    items = {item.id: item for item in join_views(find_studies(str(tmp_path)).items)}
    assert {*items} == {f"{name}.dcm" for name in "acdef"}, "a study with two frontal films is left as it is"
    assert items["a.dcm"].lateral == tmp_path / "b.dcm" and items["c.dcm"].lateral is None
    lateral = pydicom.dcmread(tmp_path / "b.dcm")
    lateral.PatientID = "SOMEBODY_ELSE"
    lateral.save_as(tmp_path / "b.dcm")
    assert all(item.lateral is None for item in join_views(find_studies(str(tmp_path)).items))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text('image,id\n"\0 ./x.pngé', max_size=120).map(str.encode)))
def test_no_table_breaks_it(tmp_path: Path, content: bytes):
    table = tmp_path / "studies.csv"
    for start in (b"", b"image,id,indication\n"):
        table.write_bytes(start + content)
        try:
            items = find_studies(str(table)).items
        except CbedgeError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert len({item.id for item in items}) == len(items)


def count_drafts(bundle: Path, studies: object, out: Path) -> str:
    """What a run over ``studies`` says on standard error."""
    done = run_batch(bundle, studies, out)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_drafts_are_kept_where_films_are_copied_touched_or_offline(tiny_bundle: Path, films: Path, tmp_path: Path):
    table, out = films / "studies.csv", tmp_path / "reports.jsonl"
    table.write_text("image,lateral\nmore/0.png,more/2.png\nmore/1.png,\n", encoding="utf-8")
    assert "wrote 2 drafts to" in count_drafts(tiny_bundle, table, out)
    before = out.read_bytes()
    os.utime(films / "more" / "0.png", (1, 1))
    assert "wrote 0 drafts to" in count_drafts(tiny_bundle, table, out)
    copy = tmp_path / "elsewhere"
    shutil.copytree(films, copy, copy_function=shutil.copyfile)
    assert "wrote 0 drafts to" in count_drafts(tiny_bundle, copy / "studies.csv", out)
    (films / "more" / "1.png").unlink()
    assert "wrote 0 drafts to" in count_drafts(tiny_bundle, table, out)
    assert out.read_bytes() == before
    Image.fromarray(draw_chest(7)).save(films / "more" / "1.png")
    assert "wrote 1 draft to" in count_drafts(tiny_bundle, table, out)


@pytest.mark.parametrize("content", ["Dear colleague", "{}", "[1]", "x\0\0"])
def test_a_foreign_file_without_a_last_newline_is_left_alone(
    content: str, tiny_bundle: Path, films: Path, tmp_path: Path
):
    out = tmp_path / "letter.txt"
    out.write_text(content)
    done = run_batch(tiny_bundle, films / "more", out)
    assert done.returncode == 7 and "was not written by cbedge batch" in done.stderr
    assert out.read_text() == content


def test_parquet_replaces_no_input_and_not_the_drafts(tiny_bundle: Path, films: Path, tmp_path: Path):
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table, out, film = films / "studies.csv", tmp_path / "reports.jsonl", films / "more" / "0.png"
    table.write_text("image\nmore/0.png\n", encoding="utf-8")
    os.link(film, tmp_path / "hard.png")
    for target in (out, tmp_path / "x" / ".." / "reports.jsonl", film, tmp_path / "hard.png", table):
        (tmp_path / "x").mkdir(exist_ok=True)
        content = target.read_bytes() if target.exists() else None
        done = run_batch(tiny_bundle, table, out, "--parquet", target, "--force")
        assert done.returncode == 7 and "Traceback" not in done.stderr, (target, done.stderr)
        assert (target.read_bytes() if target.exists() else None) == content


def test_a_linked_output_stays_a_link_with_one_lock(tiny_bundle: Path, films: Path, tmp_path: Path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    run_batch(tiny_bundle, films / "more", real)
    real.write_bytes(real.read_bytes() + b"\n")
    link.symlink_to(real)
    assert "wrote 0 drafts to" in count_drafts(tiny_bundle, films / "more", link)
    assert link.is_symlink() and len(list(batch.read_lines(real))) == 3
    lock = lock_file(lock_path(real), "busy")
    try:
        assert "another cbedge batch is writing" in run_batch(tiny_bundle, films / "more", link).stderr
    finally:
        lock.release()


def test_a_file_has_one_name_under_every_locale(tiny_bundle: Path, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    films, out = tmp_path / "films", tmp_path / "reports.jsonl"
    films.mkdir()
    for name in ("ü.png".encode(), b"\xfc.png"):
        with open(os.path.join(os.fsencode(films), name), "wb") as file:
            Image.fromarray(draw_chest(0)).save(file, "png")
    command = ("cbedge.cli", "batch", films, "--out", out, "--model", tiny_bundle, "--max-new-tokens", 4)
    assert run_cli(*command).returncode == 0
    plain = run_cli(*command, "--parquet", tmp_path / "t.parquet", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert plain.returncode == 0 and "wrote 0 drafts to" in plain.stderr, plain.stderr
    names = {row["id"] for row in pyarrow.read_table(tmp_path / "t.parquet").to_pylist()}
    assert names == {"ü.png", "\\udcfc.png"}


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nimage;indication\na.png;cough\n",
        '"sep=;"\nimage;indication\na.png;cough\n',
        "\n \n,,\nimage,indication\na.png,cough\n",
        "\nSEP=,\n\nimage,indication\na.png,cough\n",
        "image,indication,,\na.png,cough,,\n",
    ],
)
def test_what_spreadsheet_programs_add_is_passed_over(text: str, tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_text(text, encoding="utf-8")
    assert [(i.id, i.indication) for i in find_studies(str(table)).items] == [("a.png", "cough")]


def test_links_to_folders_are_named_and_not_followed(tmp_path: Path):
    Image.fromarray(draw_chest(0)).save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_studies(str(tmp_path))
    assert [item.id for item in found.items] == ["a.png"] and found.skipped == ["loop"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_a_folder_without_permission_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret").mkdir()
        Image.fromarray(draw_chest(0)).save(folder / "a.png")
        (folder / "secret").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # whom no permission stops
                os.seteuid(65534)
            found = find_studies(name)
        finally:
            os.seteuid(user)
            (folder / "secret").chmod(0o700)
    assert [item.id for item in found.items] == ["a.png"] and found.unreadable == [str(folder / "secret")]
