"""The command line as a user drives it: a process, its output, its exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEFAULT_BUNDLE, EXAMPLES, ROOT, USUAL_VARIANT, call_cli, needs_default_model, run_cli
from PIL import Image

from cbedge import __version__


def cbedge(*arguments: object):
    return run_cli("cbedge.cli", *arguments)


@pytest.fixture
def generate(tiny_bundle: Path, chest_png: Path):
    def call(*options: object, image: Path = chest_png, model: Path = tiny_bundle, start=run_cli):
        given = ("--model", model, "--device", "cpu", "--max-new-tokens", 8)
        return start("cbedge.cli", "generate", image, *given, *options)

    return call


def test_piped_output_is_plain_text_with_the_statement(generate):
    done = generate("--indication", "cough")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "Unreviewed draft" in done.stdout
    assert "Traceback" not in done.stderr


def test_json_is_one_object_on_standard_output(generate):
    told = json.loads(generate("--json", "--lateral", EXAMPLES / "chest_pa.png").stdout)
    assert told["model"] == "tiny" and told["new_tokens"] <= 8
    assert told["lateral_sha256"] not in (None, told["image_sha256"])


def test_output_is_written_once_and_replaced_only_by_force(generate, tmp_path: Path):
    target = tmp_path / "draft.json"
    assert generate("--json", "--output", target).returncode == 0
    before = target.read_bytes()
    again = generate("--json", "--output", target)
    assert again.returncode == 7 and "--force" in again.stderr and target.read_bytes() == before
    assert generate("--output", target, "--force").returncode == 0 and target.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["draft.json"]


def broken(folder: Path, kind: str) -> Path:
    chest = Image.open(EXAMPLES / "chest_pa.png")
    path = folder / f"{kind}.png"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes((EXAMPLES / "chest_pa.png").read_bytes()[:20_000])
    elif kind == "truncated-dicom":
        path.write_bytes((EXAMPLES / "chest_pa.dcm").read_bytes()[:20_000])
    elif kind == "bomb":
        Image.new("L", (20_000, 20_000)).save(path)
    elif kind == "frames":
        path = path.with_suffix(".tiff")
        chest.save(path, save_all=True, append_images=[chest])
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "truncated-dicom", "bomb", "frames"])
def test_an_unusable_image_is_one_line_and_exit_code_3(generate, tmp_path: Path, kind: str):
    done = generate("--output", tmp_path / "out.txt", image=broken(tmp_path, kind))
    assert done.returncode == 3
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and kind in done.stderr
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--template", "none.txt"], 4, "none.txt"),
        (["--template", "README.md"], 4, "limit is 4,000"),
        (["--template", "README.md", "--no-template"], 2, "cannot be combined"),
        (["--indication", "x" * 1001], 4, "1,000"),
        (["--view", "sideways"], 4, "frontal"),
        (["--lateral", "none.png"], 3, "no such file: none.png"),
        (["--lateral", EXAMPLES / "chest_pa.png", "--view", "lateral"], 3, "first radiograph is a lateral view"),
        (["--format", "pdf"], 2, "unknown format"),
        (["--variant", "int2"], 5, "unknown variant"),
        (["--device", "tpu"], 6, "unknown device"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--output", "no/such/folder/x.txt"], 7, "no such folder"),
    ],
)
def test_a_wrong_option_is_one_line_and_its_own_exit_code(generate, options: list, code: int, told: str):
    done = generate(*options, start=call_cli)
    assert done.returncode == code and told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_altered_bundle_is_exit_code_5(generate, tiny_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "vision_encoder_q4.onnx").write_bytes(b"altered")
    done = generate(model=copy)
    assert done.returncode == 5 and "vision_encoder_q4.onnx" in done.stderr and "Traceback" not in done.stderr


def test_the_model_command_says_what_it_is_and_verifies_it(tiny_bundle: Path):
    done = cbedge("model", "--model", tiny_bundle)
    assert done.returncode == 0 and "tiny 0.1.0" in done.stdout and "verified" in done.stdout
    (taken,) = [line for line in done.stdout.splitlines() if line.endswith("default on this machine")]
    assert taken.strip().startswith(f"{USUAL_VARIANT}:")
    assert "# tiny 0.1.0" in call_cli("cbedge.cli", "model", "--model", tiny_bundle, "--card").stdout
    both = call_cli("cbedge.cli", "model", "--model", tiny_bundle, "--card", "--json")
    assert both.returncode != 0 and both.stdout == "" and "give one" in both.stderr
    assert json.loads(call_cli("cbedge.cli", "model", "--model", tiny_bundle, "--json").stdout)["name"] == "tiny"


@needs_default_model
def test_the_model_command_shows_what_the_image_decides_first_and_the_controls_apart(tmp_path: Path):
    lines = call_cli("cbedge.cli", "model").stdout.splitlines()
    head = next(line for line in lines if "METEOR" in line)
    names = ("balanced accuracy", "F1, micro", "F1, macro", "METEOR", "ROUGE-L", "CIDEr")
    assert [head.index(name) for name in names] == sorted(head.index(name) for name in names)
    rows = [line.split("  ")[0].strip() for line in (line.strip() for line in lines)]
    assert rows.index("q4a8 (cbedge)") < rows.index("controls") < rows.index("images swapped") < rows.index("constant")
    assert sum(line.strip().startswith("consensus of 25: the report") for line in lines) == 1
    assert "Read balanced accuracy" in "".join(lines)
    bundle = Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["quality"]["clinical"]
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    told = call_cli("cbedge.cli", "model", "--model", bundle).stdout
    assert "Balanced accuracy and F1 are not in this bundle" in told and "CIDEr" in told


@needs_default_model
def test_an_option_of_serve_and_a_pair_of_radiographs_have_their_own_exit_codes(tiny_bundle: Path):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    done = cbedge("serve", "--model", tiny_bundle, "--host", "0.0.0.0")
    assert done.returncode == 2 and "give --token" in done.stderr
    film = EXAMPLES / "chest_pa.png"
    pair = cbedge("generate", film, "--lateral", film)
    assert pair.returncode == 3 and "same image" in pair.stderr


@needs_default_model
def test_package_model_and_documents_have_one_version():
    manifest = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    card = (DEFAULT_BUNDLE / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert cbedge("--version").stdout.strip() == f"cbedge {__version__}"
    assert manifest["version"] == __version__ and card.startswith(f"# {manifest['name']} {__version__}\n")
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_help():
    told = cbedge("generate", "--help").stdout
    for option in ("--indication", "--comparison", "--view", "--variant", "--device", "--json", "--output"):
        assert option in told


def test_importing_cbedge_loads_neither_torch_nor_onnxruntime():
    heavy = ("torch", "transformers", "onnxruntime")
    code = f"import cbedge, cbedge.cli.main, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("imported", ["cbedge.cli", "typer", "cbedge.cli.serve"])
def test_ctrl_c_while_the_command_line_is_imported_is_one_line(imported: str):
    code = f"""
import os, runpy, signal, sys
class Interrupting:
    def find_spec(self, name, *rest):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("cbedge", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "cbedge: interrupted\n")


def on_a_terminal(*arguments: object) -> str:
    """What ``cbedge ARGUMENTS`` shows on a terminal."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    chunks: list[bytes] = []

    def read(handle: int) -> bytes:
        chunks.append(os.read(handle, 4096))
        return chunks[-1]

    status = pty.spawn([sys.executable, "-m", "cbedge.cli", *map(str, arguments)], read, lambda handle: b"")
    assert os.waitstatus_to_exitcode(status) == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


def test_a_terminal_sees_the_draft_and_the_statement(tiny_bundle: Path, chest_png: Path):
    shown = on_a_terminal("generate", chest_png, "--model", tiny_bundle, "--max-new-tokens", 8)
    assert "Unreviewed draft" in shown and "cut off" in shown and "raise --max-new-tokens" in shown


def test_the_note_about_a_draft_cut_off_names_the_limit_that_was_given(generate):
    done = generate("--max-new-tokens", 3)
    assert done.returncode == 0
    assert "cut off by --max-new-tokens 3, before the end of its first sentence, so it is empty; raise" in done.stderr


@needs_default_model
def test_a_terminal_shows_the_same_paragraphs_as_a_pipe():
    command = ("generate", EXAMPLES / "chest_pa.png", "--device", "cpu")
    shown = on_a_terminal(*command)
    assert "\n\nIMPRESSION:" in shown and shown == cbedge(*command).stdout


def test_help_says_what_is_taken_where_nothing_is_given():
    told = call_cli("cbedge.cli", "generate", "--help").stdout
    assert "from the header" in told and "--no-template" in told
