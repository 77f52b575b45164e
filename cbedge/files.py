"""Write files whole or not at all, and lock what only one process may change. Works on Linux, macOS and Windows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from cbedge.errors import OutputError


def write_atomically(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file that appears whole and synced to disk, or not at all.

    Args:
        path: the file; its folder must exist.
        content: its bytes.
        replace: whether a file that exists may be replaced.

    Raises:
        FileExistsError: the file exists and ``replace`` is false.
        OSError: it cannot be written.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _rename_new(partial, path)
        sync_folder(path.parent)
    finally:
        Path(partial).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can (Windows cannot open folders)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def lock_file(path: Path, busy: str) -> FileLock:
    """Take the lock of a file or folder for as long as the returned lock lives or until its ``release()``.

    Args:
        path: the lock file, made where it does not exist.
        busy: what to say where another process has the lock.

    Raises:
        OutputError: another process has the lock.
        OSError: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(busy) from None
    return lock


def _rename_new(partial: str, path: Path) -> None:
    """Rename, but never over a file that appeared meanwhile."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: a small window remains
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)
