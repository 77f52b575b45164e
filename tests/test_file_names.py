import os
import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cbedge import OutputError, files
from cbedge.file_names import safe_name, windows_fault
from cbedge.files import check_output, write_output
from cbedge.services import batch


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(
            (name, "device")
            for name in (
                "CON",
                "nul",
                "Prn.txt",
                "AUX.tar.gz",
                "COM1",
                "com0.json",
                "LPT9.",
                "COM¹.x",
                "NUL .jsonl",
                "conin$",
                "CONOUT$.txt",
                "con  ",
            )
        ),
        *((f"a{c}b", "contains the character") for c in '<>:"/\\|?*\0\n\t\x1f'),
        ("draft.", "ends with"),
        ("draft ", "ends with"),
        ("...", "ends with"),
        ("", "empty"),
        ("x" * 256, "255"),
        ("\U0001fac1" * 128, "255"),
        *(
            (name, None)
            for name in (
                "draft.json",
                "CONSOLE",
                "COM10",
                "LPT",
                ".CON",
                "nul-1.txt",
                "1.2.840.dcm",
                "übung",
                "a b.txt",
                "x" * 255,
                "\U0001fac1" * 127,
                "COM",
                " CON",
            )
        ),
    ],
)
def test_what_windows_cannot_hold_is_told(name: str, why: str | None):
    found = windows_fault(name)
    assert found is None if why is None else found is not None and why in found


ANY = st.text(st.characters(), max_size=400) | st.text("CONULPTcom19. %~:\\/", max_size=12)


@given(ANY, ANY)
@example("CON", "%43ON")
@example("a.", "a%2E")
@example("", "%")
@example("x" * 300, "x" * 301)
@example("\ud800", "\udc80")
@example("é", "e\u0301")
def test_a_safe_name_can_be_held_everywhere_and_tells_texts_apart(first: str, second: str):
    name = safe_name(first)
    assert windows_fault(name) is None and name.isascii() and name.isprintable()
    assert 0 < len(name) <= 200 and name[0] != "." and set(name) <= {*string.printable} - {*'<>:"/\\|?*\n\r\t\x0b\x0c'}
    assert (name == safe_name(second)) == (first == second)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("1.2.840.10008.1", "1.2.840.10008.1"),
        ("study 7 (PA)", "study 7 (PA)"),
        ("A/B\\C:D", "A%2FB%5CC%3AD"),
        ("nul.txt", "%6Eul.txt"),
        ("..", "%2E%2E"),
        ("Müller", "M%C3%BCller"),
        ("", "%"),
        ("100%", "100%25"),
        ("end. ", "end.%20"),
    ],
)
def test_a_safe_name_resembles_the_text(text: str, name: str):
    assert safe_name(text) == name


@pytest.mark.parametrize("name", ["NUL.json", "draft.json.", "draft:1", "aux", "what?.jsonl"])
def test_an_output_that_windows_would_write_elsewhere_is_refused_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check_output(tmp_path / name, False)  # on other systems it is a name like any
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    for check in (
        lambda path: check_output(path, True),
        lambda path: write_output(path, b"x", True),
        lambda path: batch.run_batch([], path, "m", lambda item: {}),
    ):
        with pytest.raises(OutputError, match="Windows"):
            check(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_too_long_for_windows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    folder = tmp_path.joinpath(*["folder" * 8] * 6)
    assert len(os.fspath(folder)) > 259
    with pytest.raises(OutputError, match="longer than the 259 characters"):
        check_output(folder / "draft.json", True)  # the folder is not found there, whether it exists or not
    check_output(tmp_path / "draft.json", True)
