"""Where a measured figure comes from: the entries that every record of a measurement starts with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cbedge.backends.provider import is_installed
from cbedge.bundles.bundle import CARD, DEFAULT_BUNDLE
from cbedge.bundles.manifest import MANIFEST
from cbedge.machine import machine

UNKNOWN = "unknown"
_ROOT = Path(__file__).parent.parent
_ABOUT_THE_MODEL = (CARD, "parity.json")  # files that say what was measured, and change no draft


def provenance(
    data: str, model: Path | None = None, packages: Iterable[str] = (), bundle: bool = True
) -> dict[str, Any]:
    """The first entries of a record.

    Args:
        data: what was drafted or read: the collection, its split, and how many.
        model: folder of the bundle; default is the embedded one.
        packages: packages whose versions matter, besides those of :func:`cbedge.machine.machine`.
        bundle: false for a measurement without a bundle, such as of a training run.

    Returns:
        ``command`` (see :func:`command_line`), ``commit`` (see :func:`commit`), ``bundle`` (name, version and SHA-256,
        see :func:`bundle_sha256`; or ``None``), ``data``, ``versions``, and ``machine`` with the date.
    """
    return {
        "command": command_line(),
        "commit": _COMMIT,
        "bundle": describe_bundle(model or DEFAULT_BUNDLE) if bundle else None,
        "data": data,
        "versions": {name: version(name) for name in packages if is_installed(name)},
        "machine": machine(),
    }


def commit(root: Path = _ROOT) -> str:
    """The commit of a checkout, with ``-dirty`` behind it if files were changed; ``unknown`` outside a repository."""
    if not (root / ".git").exists():  # such as an installed package, also one inside another repository
        return UNKNOWN
    try:
        name = _git(root, "describe", "--always", "--abbrev=12")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return f"{name}-dirty" if changed else name
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(root: Path, *arguments: str) -> str:
    """What git prints; it takes no lock, so nothing is written in the checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def describe_bundle(folder: Path) -> dict[str, str]:
    """Name, version and :func:`bundle_sha256` of the bundle in a folder."""
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {"name": values["name"], "version": values["version"], "sha256": bundle_sha256(folder)}


def bundle_sha256(folder: Path) -> str:
    """SHA-256 of what determines a bundle's drafts: its manifest, which has the SHA-256 of every file.

    Measured quality, the model card and the parity record are left out, because they are added after the measurement.
    """
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    values.pop("quality", None)
    values["files"] = {name: file for name, file in values["files"].items() if name not in _ABOUT_THE_MODEL}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def command_line() -> str:
    """What was typed to start this program, such as ``python -m training evaluate``, without folders of the machine:
    a path that is absolute or leads upwards is shown by its name."""
    started_as = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script such as ``cbedge``
    module = started_as.name.removesuffix(".__main__") if started_as else ""
    return " ".join([f"python -m {module}" if module else Path(sys.argv[0]).name, *map(_shown, sys.argv[1:])])


def _shown(word: str) -> str:
    option, separator, path = word.rpartition("=")
    elsewhere = Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts
    return f"{option}{separator}{Path(path).name if elsewhere else path}"


_COMMIT = commit()  # when the program starts: files may change while it measures
