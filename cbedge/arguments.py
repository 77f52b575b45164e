"""Checks of arguments that Python callers give: type, range and names."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable
from typing import Any

from cbedge.errors import CbedgeError, OptionError


def check_type(
    name: str, value: Any, kind: type | tuple[type, ...], wanted: str, error: type[CbedgeError] = OptionError
) -> None:
    """Check the type of an argument; ``True`` and ``False`` are not numbers.

    Raises:
        CbedgeError: the value has another type than ``kind``; the message has the allowed types in words (``wanted``),
            but not the value.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (numbers.Real, numbers.Integral)):
        raise error(f"{name} must be {wanted}, not {type(value).__name__}")


def check_count(name: str, value: Any, least: int, most: int) -> int:
    """Check a whole number, of any integer type, and return it.

    Raises:
        OptionError: it has another type, or is out of range.
    """
    check_type(name, value, numbers.Integral, "a whole number")
    if not least <= int(value) <= most:
        raise OptionError(f"{name} is {value}; give {least} to {most:,}")
    return int(value)


def check_names(what: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Check the names of fields or settings.

    Raises:
        OptionError: one is unknown.
    """
    unknown = next((str(name) for name in given if name not in known), None)
    if unknown is not None:
        raise OptionError(f"{what} has no {unknown[:40]!r}; it has: {', '.join(known)}")
