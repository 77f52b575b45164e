"""File names that every system can hold; pure functions, the same on all of them."""

from __future__ import annotations

import hashlib

MAX_WINDOWS_PATH = 259  # characters, where long paths are not switched on
_PORTS = [f"{kind}{number}" for kind in ("COM", "LPT") for number in "0123456789¹²³"]
_DEVICES = frozenset(["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS])
_FORBIDDEN = frozenset('<>:"/\\|?*')
_PLAIN = frozenset(" !#$&'()+,-.;=@[]^_`{}~")
_MAX_CHARACTERS = 200  # leaves room for suffixes within the 255 bytes that file systems allow


def windows_fault(name: str) -> str | None:
    """Why Windows cannot hold a file of this name, in words behind "it"; ``None`` where it can.

    Windows takes some of these names without an error, and writes elsewhere: to a device, to a hidden stream of another
    file, or to a file without the dots and spaces at the end.
    """
    if name.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return "is the name of a device"
    character = next((c for c in name if c < " " or c in _FORBIDDEN), None)
    if character is not None:
        return f"holds the character {character!a}"
    if not name or name[-1] in ". ":
        return "ends with a dot or a space" if name else "is empty"
    return "has more than 255 characters" if len(name.encode("utf-16-le", "surrogatepass")) > 510 else None


def safe_name(text: str) -> str:
    """A file name for a text of any kind, such as an identifier that somebody else chose.

    ASCII letters, digits and harmless punctuation are kept; all else is escaped as in addresses (``%3A``), as are a dot
    at the beginning or end and the first letter of a device's name. Different texts have different names; a system that
    does not tell upper from lower case may not tell those that differ in nothing else.
    """
    parts = [c if (c.isascii() and c.isalnum()) or c in _PLAIN else _escaped(c) for c in text]
    if parts and (text[0] == "." or windows_fault(text) == "is the name of a device"):
        parts[0] = _escaped(text[0])
    if parts and text[-1] in ". ":
        parts[-1] = _escaped(text[-1])
    name = "".join(parts) or "%"
    if len(name) < _MAX_CHARACTERS:  # names with a hash have just as many, so that no other is the same
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[: _MAX_CHARACTERS - 65]}%{digest}"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
