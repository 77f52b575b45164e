"""Atomic writing and locking of files, on Linux, macOS and Windows."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cbedge.errors import OutputError
from cbedge.file_names import MAX_WINDOWS_PATH, windows_fault

if TYPE_CHECKING:
    from filelock import FileLock

ON_WINDOWS = os.name == "nt"
_MAX_NAME_BYTES = 255
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,6})")
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def open_atomically(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file that appears at ``path``, complete and synced to disk, if the block ends without an error.

    The folder must exist. A new file's permissions follow the umask. A file that is replaced keeps its permissions.

    Raises:
        FileExistsError: the file exists and ``replace`` is false.
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")  # short: Windows allows 259 characters for a path
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            with suppress(OSError):  # a new file, or a file system without permissions
                os.chmod(partial, path.stat().st_mode & 0o777)
            os.replace(partial, path)
        else:
            _rename_new(partial, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # such as a disk that became read-only; the first error is the relevant one
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, *content: bytes | memoryview, replace: bool = True) -> None:
    """Write a file, in one or more pieces, atomically and synced to disk, as :func:`open_atomically` does."""
    with open_atomically(path, replace) as file:
        file.writelines(content)


def check_output(path: Path, replace: bool, inputs: Iterable[Path] = (), regular: bool = False) -> None:
    """Check before the work starts that :func:`write_output` can write there, and that it is not one of the inputs.

    Args:
        path: path of the output.
        replace: whether a file that exists may be replaced.
        inputs: files that are read; they must not be overwritten, under any name or link.
        regular: whether the output must be a regular file, because it is read again.

    Raises:
        OutputError: the output cannot be written there.
    """
    if str(path) == "-":
        raise OutputError("- is not a file name: give a name, or none where the default is standard output")
    number = None if regular else _descriptor(path)
    fault = windows_fault(path.name) if ON_WINDOWS else None
    if fault:
        raise OutputError(f"Windows does not allow the file name {_short(path)}, which {fault}; give another one")
    try:
        state = path.stat() if number is None else os.fstat(number)
    except FileNotFoundError:
        folder = _target(path).parent
        if len(os.fsencode(_target(path).name)) > _MAX_NAME_BYTES:
            raise OutputError(f"the file name {path.name[:40]}… is too long: give a shorter one") from None
        if not folder.is_dir():
            if ON_WINDOWS and len(os.path.abspath(path)) > MAX_WINDOWS_PATH:
                long = f"longer than the {MAX_WINDOWS_PATH} characters that Windows allows"
                raise OutputError(f"the path {_short(path)} is {long}: give a shorter one") from None
            raise OutputError(f"no such folder: {folder}; create it, or give another path") from None
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {_short(path)}: {_reason(error)}; give another path") from None
    kind = state.st_mode
    if stat.S_ISDIR(kind):
        raise OutputError(f"{path} is a folder; give a file")
    if any(is_same_file(path, source) for source in inputs):
        raise OutputError(f"{path} is an input file, and inputs are never overwritten: give another path")
    if number is not None:
        return
    if not stat.S_ISREG(kind):
        if regular or not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):
            raise OutputError(f"{path} is not a regular file; give another path")
        return
    if not replace:
        raise OutputError(f"{path} already exists: give --force to overwrite it, or another name")


def check_distinct(outputs: Mapping[str, Path | None]) -> None:
    """Check that no two outputs are the same file, under any spelling or link, or on a file system that ignores case:
    option → path, or ``None`` if the option is not given.

    Raises:
        OutputError: two are the same.
    """
    seen: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        other = seen.setdefault(unicodedata.normalize("NFC", str(_target(path))).casefold(), option)
        if other != option:
            raise OutputError(f"{other} and {option} are the same file: give two different names, not only in case")


def write_output(path: Path, content: bytes, replace: bool, inputs: Iterable[Path] = ()) -> None:
    """Write an output to a path given by a user, after :func:`check_output`. Pipes, terminals and other character
    devices are written directly; the file behind a symbolic link is replaced and the link is kept.

    Raises:
        OutputError: it cannot be written there.
    """
    check_output(path, replace, inputs)
    try:
        number = _descriptor(path)
        if number is not None:
            with open(os.dup(number), "wb") as stream:
                stream.write(content)
        elif path.exists() and not path.is_file():
            with open(path, "wb") as stream:
                stream.write(content)
        else:
            write_atomically(_target(path), content, replace=replace)
    except FileExistsError:
        raise OutputError(f"{path} already exists: give --force to overwrite it, or another name") from None
    except OSError as error:
        raise OutputError(f"cannot write {_short(path)}: {_reason(error)}; give another path") from None


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths are the same file, also by another spelling, a symbolic link or a hard link."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, if the system supports it (Windows cannot open folders)."""
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
    """Lock a file, created if necessary, until the returned lock is released or deleted.

    The lock ends with the process: a lock file that was left behind has no effect.

    Raises:
        OutputError: another process has the lock; the message is ``busy``.
        OSError: the lock file cannot be created, or the file system cannot lock.
    """
    from filelock import FileLock, Timeout  # imported here because most commands need no lock

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(busy) from None
    except NotImplementedError:
        raise OSError(errno.ENOTSUP, "this file system cannot lock files") from None
    return lock


def unlock_file(lock: FileLock) -> None:
    """Release a lock and remove its file, first the name, so that no other process can lock a file without a name:
    filelock tries again when that happens. On Windows, where open files cannot be removed, filelock removes it."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def lock_path(path: Path) -> Path:
    """The lock file of a file: in the same folder, with a hidden name."""
    name = f".{path.name}.lock"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.lock"
    return path.with_name(name)


def _rename_new(partial: Path, path: Path) -> None:
    """Rename without overwriting a file that was created meanwhile."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # no hard links: a short race remains
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)


def _descriptor(path: Path) -> int | None:
    """The file descriptor of a path such as ``/dev/stdout`` or ``/dev/fd/3``."""
    name = os.path.normpath(path)
    match = _DESCRIPTOR.fullmatch(name)
    return int(match[1]) if match else _STREAMS.get(name)


def _target(path: Path) -> Path:
    """The file behind symbolic links; it need not exist."""
    return Path(os.path.realpath(path))


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:40]}…"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
