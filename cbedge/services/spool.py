"""The queue of the DICOM node on disk.

Every change is a rename of a file that was synced before, so a process that is killed at any moment goes on where it
stopped.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from pathlib import Path

from cbedge.errors import OutputError
from cbedge.files import lock_file, write_atomically

Version = tuple[int, int, int]
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


def version_of(path: Path) -> Version | None:
    """Tells a file from one that replaced it; ``None`` where there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def machine_trouble(error: BaseException | None) -> OSError | None:
    """The error behind an error where the machine is the cause, not the file: a full disk, too many open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            return error
        error = error.__cause__ or error.__context__
    return None


class Spool:
    """The queue: ``incoming`` radiographs, ``outgoing`` drafts, ``failed`` ones of both with the reason beside.

    Raises:
        OutputError: the folder cannot be written, or another process works in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.incoming, self.outgoing, self.failed = (folder / n for n in ("incoming", "outgoing", "failed"))
        self._changes = threading.Lock()  # between looking at a file and removing it, nobody may replace it
        try:
            self.make()
            self._lock = lock_file(folder / "lock", f"another cbedge listen works in {folder}: give another --spool")
        except OSError as error:
            raise OutputError(f"cannot write the spool {folder}: {error.strerror}; give another --spool") from None
        left = [*self.incoming.glob(".*"), *self.outgoing.glob(".*")]  # what was being written when a process died
        left += [path for path in self.incoming.glob("*.attempts") if not path.with_suffix(".dcm").exists()]
        for path in left:
            with contextlib.suppress(OSError):  # a folder of somebody else's, say
                path.unlink()

    def make(self) -> None:
        """Make the folders that are not there, also while working: somebody may have cleared the spool."""
        for part in (self.incoming, self.outgoing, self.failed):
            part.mkdir(parents=True, exist_ok=True)

    def put(self, folder: Path, name: str, *parts: bytes | memoryview) -> None:
        """Write a file that is there wholly and durably, or not at all."""
        with self._changes:
            try:
                write_atomically(folder / name, *parts)
            except FileNotFoundError:
                self.make()
                write_atomically(folder / name, *parts)

    def waiting(self, folder: Path) -> list[Path]:
        """Its files, the oldest first."""
        found = []
        for path in folder.glob("*.dcm"):
            with contextlib.suppress(OSError):  # it was taken away meanwhile
                if path.is_file():
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def is_full(self, most: int) -> bool:
        """Whether so many radiographs wait."""
        with os.scandir(self.incoming) as entries:
            return sum(entry.name.endswith(".dcm") for entry in itertools.islice(entries, 2 * most + 2)) >= most

    def remove(self, path: Path, version: Version | None) -> None:
        """Delete a file that is dealt with, unless another version of it has come meanwhile."""
        with self._changes:
            if version_of(path) == version:
                path.unlink(missing_ok=True)

    def fail(self, path: Path, version: Version | None, reason: str, name: str | None = None) -> None:
        """Move a file to ``failed``, with the reason beside it, unless another version of it has come meanwhile."""
        name = name or path.name
        self.put(self.failed, f"{Path(name).stem}.txt", f"{reason}\n".encode())
        with self._changes, contextlib.suppress(FileNotFoundError):
            if version_of(path) == version:
                os.replace(path, self.failed / name)

    def deaths(self) -> dict[Path, int]:
        """How many processes ended while they drafted a radiograph, of those at which any did."""
        found = {}
        for beside in self.incoming.glob("*.attempts"):
            with contextlib.suppress(OSError, ValueError):
                found[beside.with_suffix(".dcm")] = int(beside.read_text())
        return found

    def begin(self, path: Path, deaths: int) -> None:
        """Note durably that a radiograph is being drafted: a process that ends before :meth:`end` has died of it, or
        was ended by somebody else."""
        self.put(self.incoming, path.with_suffix(".attempts").name, str(deaths + 1).encode())

    def end(self, path: Path) -> None:
        """The radiograph is no longer being drafted."""
        path.with_suffix(".attempts").unlink(missing_ok=True)
