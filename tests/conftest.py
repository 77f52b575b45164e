"""Real components, only small: a random InstructBLIP in transformers' format, studies with drawn radiographs."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from cbedge.backends.int8 import multiplies_exactly

if TYPE_CHECKING:
    import httpx

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other in circles
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["dicom_node"]  # fixtures of the DICOM node
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DEFAULT_BUNDLE = ROOT / "cbedge" / "models" / "default"
REPORTS = (
    ("The heart is normal in size. The lungs are clear.", "No acute disease."),
    ("The heart is enlarged. There is a small left pleural effusion.", "Cardiomegaly and effusion."),
    ("Lungs are clear. No pneumothorax. Comparison XXXX.", "Normal chest x-XXXX."),
    ("There is an opacity in the right lower lobe.", "Possible pneumonia."),
)
TAGS = (["normal"], ["Cardiomegaly/mild", "Pleural Effusion/left"], ["normal"], ["Opacity/lung/lower lobe/right"])


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


class TextFile(SingleFileSnapshotExtension):
    """A snapshot is a text file of its own, so that its diff reads like any other."""

    file_extension = "txt"
    _write_mode = WriteMode.TEXT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with a file that needs no exported model, while another worker makes the one that most tests use."""
    items.sort(key=lambda item: item.path.name != "test_golden.py")


@pytest.fixture
def snapshot(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(TextFile)


def run_cli(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """``python -m ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
    )


def call_cli(module: str, *arguments: object) -> subprocess.CompletedProcess:
    """``python -m MODULE ARGUMENTS`` in this process, which has the imports behind it."""
    from training.command_line import run

    interrupt = signal.getsignal(signal.SIGINT)
    words = [module, *map(str, arguments)]
    try:
        program = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        program = importlib.import_module(module)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        try:
            program.main() if module.startswith("cbedge.") else run(program.app)
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            signal.signal(signal.SIGINT, interrupt)
    return subprocess.CompletedProcess(words, code, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def draw_chest(seed: int, rows: int = 240, columns: int = 200) -> np.ndarray:
    """Two dark lungs in a bright body, uint8 [rows, columns]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns])[:, None, None]
    body = 0.75 + 0.1 * rng.random()
    for centre in (0.3, 0.7):
        body = body - 0.5 * np.exp(-((((x - centre) / 0.13) ** 2 + ((y - 0.5) / 0.28) ** 2) ** 2))
    return np.clip(255 * (body + 0.03 * rng.standard_normal((rows, columns))), 0, 255).astype(np.uint8)


def draw_lateral(seed: int) -> np.ndarray:
    """One dark lung before a bright spine, uint8 [240, 200]."""
    y, x = np.mgrid[0:240, 0:200] / np.array([240, 200])[:, None, None]
    body = 0.6 + 0.3 * x - 0.5 * np.exp(-((((x - 0.45) / 0.25) ** 2 + ((y - 0.5) / 0.3) ** 2) ** 2))
    return np.clip(255 * (body + 0.03 * np.random.default_rng(seed).standard_normal((240, 200))), 0, 255).astype(
        np.uint8
    )


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Makes a folder by a function, once for all processes of pytest-xdist; tests do not change what is in it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def chest_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chest") / "chest.png"
    Image.fromarray(draw_chest(0)).save(path)
    return path


def save_data(folder: Path) -> None:
    """Twenty studies in the layout of ``studies.jsonl``, two of three with a lateral radiograph."""
    (folder / "images").mkdir()
    lines = []
    for number, split in enumerate(["train"] * 12 + ["val"] * 4 + ["test"] * 4):
        findings, impression = REPORTS[number % 4]
        images = [{"file": f"{number}.jpg", "view": "frontal", "columns": 200, "rows": 240}]
        Image.fromarray(draw_chest(number)).save(folder / "images" / f"{number}.jpg")
        if number % 3:
            images.append({"file": f"{number}-lateral.jpg", "view": "lateral", "columns": 200, "rows": 240})
            Image.fromarray(draw_lateral(number)).save(folder / "images" / f"{number}-lateral.jpg")
        lines.append(
            {
                "study_id": f"S{number}",
                "split": split,
                "r2gen_id": f"S{number}",
                "images": images,
                "indication": "XXXX-year-old with cough." if number % 2 else None,
                "comparison": "None." if number % 3 else None,
                "exam": "Chest",
                "findings": findings,
                "impression": impression,
                "mesh_major": TAGS[number % 4],
                "mesh_automatic": [],
                "problems": [],
            }
        )
    (folder / "studies.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_data(make_once: MakeOnce) -> Path:
    """The folder of :func:`save_data`."""
    return make_once("data", save_data)


def save_tiny(folder: Path, flan_t5: bool = False) -> Path:
    """A random InstructBLIP, saved in the layout of ``Salesforce/instructblip-vicuna-7b``, or of ``-flan-t5-xl``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
        T5Config,
    )

    from training.base import ModelAndTokenizers

    corpus = [f"FINDINGS: {f} IMPRESSION: {i}" for f, i in REPORTS]
    corpus += ["Describe the chest radiograph. View: frontal. Indication: cough. Comparison: None.\nReport:\n"]
    specials, alphabet = ["<unk>", "<s>", "</s>", "<image>"], pre_tokenizers.ByteLevel.alphabet()
    language = Tokenizer(models.Unigram() if flan_t5 else models.BPE(unk_token="<unk>"))
    if flan_t5:
        language.pre_tokenizer, language.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=specials, vocab_size=200, unk_token="<unk>")
    else:
        language.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        language.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(special_tokens=specials, vocab_size=384, initial_alphabet=alphabet)
    language.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=language, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=256, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    )
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    qformer_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    size = language.get_vocab_size()
    llama = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    t5 = T5Config(
        vocab_size=size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=56,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=words.get_vocab_size(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            cross_attention_frequency=2,
            encoder_hidden_size=32,
        ),
        text_config=t5 if flan_t5 else llama,
        num_query_tokens=20,
        image_token_index=3,
    )
    model = InstructBlipForConditionalGeneration(config)
    ModelAndTokenizers(model, tokenizer, qformer_tokenizer, 3).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(make_once: MakeOnce) -> Path:
    """A random InstructBLIP saved in the layout of ``Salesforce/instructblip-vicuna-7b``."""
    return make_once("checkpoint", save_tiny)


TINY_RUN = """
base: {base}
data: data
output: runs/tiny
stages:
  - name: align
    train: [qformer, query_tokens, projection]
    losses: {{contrastive: 1.0, tags: 1.0, words: 1.0}}
    cached_views: 2
    start_cross_attention: true
    batch_size: 4
    epochs: 2
    save_every: 1
  - name: wording
    lora: {{part: language, r: 4, alpha: 8, targets: [q_proj, v_proj]}}
    losses: {{language: 1.0}}
    image_blind: true
    batch_size: 4
    epochs: 2
    save_every: 1
  - name: vision
    train: [qformer, query_tokens, projection]
    lora: {{part: vision, r: 4, alpha: 8, targets: [qkv, projection, fc1, fc2]}}
    losses: {{language: 1.0, tags: 1.0}}
    lateral: true
    batch_size: 2
    accumulate: 2
    epochs: 2
    save_every: 1
  - name: language
    train: [projection]
    lora: {{part: language, r: 4, alpha: 8, targets: [q_proj, v_proj]}}
    losses: {{language: 1.0}}
    tell_findings: [cardiomegaly, effusion, opacity]
    tell_from: report
    lateral: true
    cached_views: 1
    batch_size: 4
    epochs: 2
    save_every: 1
"""


@pytest.fixture(scope="session")
def tiny_config(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY_RUN.format(base=tiny_checkpoint), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Path, tiny_data: Path, make_once: MakeOnce) -> Path:
    """Two steps of every stage, through the command line."""

    def train(folder: Path) -> None:
        output = ["--output", folder / "tiny", "--max-steps", 2]
        done = call_cli("training", "run", "--config", tiny_config, "--data", tiny_data, *output)
        assert done.returncode == 0, done.stderr

    return make_once("runs", train) / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tiny_data: Path, make_once: MakeOnce) -> Path:
    """The tiny run merged and exported in every variant, by the command."""
    from training.trained import checkpoint_of

    def export(folder: Path) -> None:
        run = ["--checkpoint", checkpoint_of(tiny_run), "--adapters", tiny_run, "--data", tiny_data]
        out = ["--out", folder / "tiny", "--name", "tiny", "--variant", "all", "--record", folder / "parity"]
        done = call_cli("export", *run, *out)
        assert done.returncode == 0, done.stderr

    return make_once("bundles", export) / "tiny"


IN_INT8 = {"q4a8"} if multiplies_exactly() else set()  # what "all" leaves out on processors that are not x86
USUAL_VARIANT = "q4a8" if IN_INT8 else "int4"
needs_default_model = pytest.mark.skipif(
    not (DEFAULT_BUNDLE / "manifest.json").is_file(), reason="the embedded default model is not in this checkout"
)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 40) -> None:
    """Wait until the condition is true; fail where it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@contextmanager
def served(bundle: Path, stderr: int, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A running ``cbedge serve``: its address, and its process."""
    import httpx

    port = free_port()
    command = [
        sys.executable,
        "-m",
        "cbedge.cli",
        "serve",
        "--port",
        str(port),
        "--model",
        str(bundle),
        "--device",
        "cpu",
        *options,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, text=True)
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{address}/readyz").is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up)
        yield address, process
    finally:
        process.kill()
        process.wait()


def needs_program(name: str, package: str) -> Callable[[Callable], Callable]:
    """Marks a test as one that talks to a real program, which may be missing."""
    missing = pytest.mark.skipif(shutil.which(name) is None, reason=f"{package} is not installed")
    return lambda test: pytest.mark.interop(missing(test))


needs_orthanc = needs_program("Orthanc", "Orthanc")


@contextmanager
def orthanc(folder: Path, aet: str, port: int, modalities: dict[str, list]) -> Iterator[httpx.Client]:
    """A running Orthanc that lets everybody store and fetch; yields a client of its REST service."""
    import httpx

    folder.mkdir()
    web = free_port()
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "Plugins": [],
        "DicomAet": aet,
        "DicomPort": port,
        "HttpPort": web,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowGet": True,
        "DicomModalities": modalities,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["Orthanc", folder / "orthanc.json"], stderr=log, stdout=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{web}", timeout=30) as client:

            def is_up() -> bool:
                try:
                    return client.get("/system").is_success
                except httpx.TransportError:
                    return False

            wait_for(is_up)
            yield client
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system, such as one of ``size=64k`` or one that is read-only; needs the right to."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode != 0:
            pytest.skip("no right to mount a file system")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)
