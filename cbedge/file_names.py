"""File names that are valid on every operating system."""

from __future__ import annotations

import hashlib

MAX_WINDOWS_PATH = 259  # characters, unless long paths are enabled
_PORTS = [f"{kind}{number}" for kind in ("COM", "LPT") for number in "0123456789¹²³"]
_DEVICES = frozenset(["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS])
_FORBIDDEN = frozenset('<>:"/\\|?*')
_PLAIN = frozenset(" !#$&'()+,-.;=@[]^_`{}~")
_MAX_CHARACTERS = 200  # leaves room for suffixes within the 255 bytes that file systems allow


def windows_fault(name: str) -> str | None:
    """Why a file name is not valid on Windows, as a phrase that follows "it"; ``None`` if it is valid.

    Windows accepts some of these names without an error and writes elsewhere: to a device, to a hidden stream of
    another file, or to a file without the dots and spaces at the end.
    """
    if name.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return "is the name of a device"
    character = next((c for c in name if c < " " or c in _FORBIDDEN), None)
    if character is not None:
        return f"contains the character {character!a}"
    if not name or name[-1] in ". ":
        return "ends with a dot or a space" if name else "is empty"
    return "has more than 255 characters" if len(name.encode("utf-16-le", "surrogatepass")) > 510 else None


def safe_name(text: str) -> str:
    """A valid file name for any text, such as an identifier from another system.

    ASCII letters, digits and safe punctuation are kept. All other characters are percent-encoded as in URLs (``%3A``),
    as are a dot at the start or end and the first letter of a device name. Different texts get different names, but
    names that differ only in case are the same file on case-insensitive file systems.
    """
    parts = [c if (c.isascii() and c.isalnum()) or c in _PLAIN else _escaped(c) for c in text]
    if parts and (text[0] == "." or windows_fault(text) == "is the name of a device"):
        parts[0] = _escaped(text[0])
    if parts and text[-1] in ". ":
        parts[-1] = _escaped(text[-1])
    name = "".join(parts) or "%"
    if len(name) < _MAX_CHARACTERS:  # names with a hash are exactly this long, so they differ from all others
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[: _MAX_CHARACTERS - 65]}%{digest}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
