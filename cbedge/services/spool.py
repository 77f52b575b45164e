"""The queue of the DICOM node on disk.

Every change is a rename of a synced file, so a killed process resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cbedge.errors import OutputError
from cbedge.files import file_sha256, lock_file, write_atomically
from cbedge.services.dicom_log import log

Version = tuple[int, int, int]
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


def version_of(path: Path) -> Version | None:
    """Identifies the version of a file; ``None`` if it does not exist."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def machine_trouble(error: BaseException | None) -> OSError | None:
    """The underlying OSError if the machine is the cause, not the file: a full disk, too many open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            return error
        error = error.__cause__ or error.__context__
    return None


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _entry_fault(path: Path) -> str:
    """Why an entry of the queue cannot be read as a file of it; empty if it can.

    Raises:
        OSError: it does not exist.
    """
    if stat.S_ISLNK(path.lstat().st_mode) and not path.exists():
        return "it is a link to nothing"
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "it is not a regular file"
    return "" if path.suffix in (".dcm", ".attempts") else "its name does not end with .dcm"


class Spool:
    """The queue: ``incoming`` radiographs, ``outgoing`` drafts, and ``failed`` files of both, each with its reason.

    Raises:
        OutputError: the folder cannot be written, or is in use by another process.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.incoming, self.outgoing, self.failed = (folder / n for n in ("incoming", "outgoing", "failed"))
        self._told: set[Path] = set()  # ignored entries that were logged
        self._changes = threading.Lock()  # no file may be replaced between its check and its removal
        try:
            self.make()
            self._lock = lock_file(folder / "lock", f"another cbedge listen uses {folder}: give another --spool")
        except OSError as error:
            raise OutputError(f"cannot write the spool {folder}: {error.strerror}; give another --spool") from None
        left = [*self.incoming.glob(".*"), *self.outgoing.glob(".*")]  # incomplete files of a killed process
        left += [path for path in self.incoming.glob("*.attempts") if not path.with_suffix(".dcm").exists()]
        for path in left:
            with contextlib.suppress(OSError):  # such as a folder
                path.unlink()

    def make(self) -> None:
        """Create missing folders; also called during operation, in case the spool was cleared."""
        for part in (self.incoming, self.outgoing, self.failed):
            part.mkdir(parents=True, exist_ok=True)

    def put(self, folder: Path, name: str, *parts: bytes | memoryview) -> None:
        """Write a file atomically and durably."""
        with self._changes:
            try:
                write_atomically(folder / name, *parts)
            except FileNotFoundError:
                self.make()
                write_atomically(folder / name, *parts)

    def waiting(self, folder: Path) -> list[Path]:
        """The files of a folder, oldest first. Every other entry is ignored, and told once in the log."""
        found = []
        for path in folder.glob("[!.]*"):
            with contextlib.suppress(OSError):  # removed meanwhile
                fault = _entry_fault(path)
                if fault and path not in self._told:
                    log(f"an entry of the folder {folder.name} is ignored because {fault}: remove it")
                    self._told.add(path)
                elif not fault and path.suffix == ".dcm":
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def holds(self, path: Path, *parts: bytes | memoryview) -> bool | None:
        """Whether a file of the queue has exactly this content; ``None`` if there is no such file."""
        try:
            if not path.is_file():
                return None
            return path.stat().st_size == sum(map(len, parts)) and file_sha256(path) == _sha256(parts)
        except FileNotFoundError:  # removed meanwhile
            return None

    def is_full(self, most: int) -> bool:
        """Whether at least ``most`` radiographs are waiting."""
        with os.scandir(self.incoming) as entries:
            return sum(entry.name.endswith(".dcm") for entry in itertools.islice(entries, 2 * most + 2)) >= most

    def remove(self, path: Path, version: Version | None) -> None:
        """Delete a finished file, unless it was replaced by another version meanwhile."""
        with self._changes:
            if version_of(path) == version:
                path.unlink(missing_ok=True)

    def fail(self, path: Path, version: Version | None, reason: str, name: str | None = None) -> None:
        """Move a file to ``failed`` and write its reason there, unless it was replaced by another version meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            target = self._free(name or path.name, lambda: file_sha256(path))
            self.put(self.failed, target.with_suffix(".txt").name, f"{reason}\n".encode())
            with self._changes:
                if version_of(path) == version:
                    os.replace(path, target)

    def put_aside(self, name: str, reason: str, *parts: bytes | memoryview) -> None:
        """Write a file that was not in the queue to ``failed``, with its reason."""
        target = self._free(name, lambda: _sha256(parts))
        self.put(self.failed, target.with_suffix(".txt").name, f"{reason}\n".encode())
        self.put(self.failed, target.name, *parts)

    def _free(self, name: str, digest: Callable[[], str]) -> Path:
        """Where a file with this SHA-256 goes in ``failed``: no file of other content is replaced."""
        target = self.failed / name
        if target.is_file() and file_sha256(target) != digest():
            return target.with_name(f"{target.stem}-{digest()[:16]}{target.suffix}")
        return target

    def deaths(self) -> dict[Path, int]:
        """Number of processes that ended while drafting a radiograph, for radiographs with at least one."""
        found = {}
        for beside in self.incoming.glob("*.attempts"):
            with contextlib.suppress(OSError, ValueError):
                if beside.is_file():  # reading a pipe would not end
                    found[beside.with_suffix(".dcm")] = int(beside.read_text())
        return found

    def begin(self, path: Path, deaths: int) -> None:
        """Record durably that a radiograph is being drafted; if :meth:`end` is never called, the process ended during
        the draft."""
        self.put(self.incoming, path.with_suffix(".attempts").name, str(deaths + 1).encode())

    def end(self, path: Path) -> None:
        """Record that the radiograph is no longer being drafted."""
        path.with_suffix(".attempts").unlink(missing_ok=True)
