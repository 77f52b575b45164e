"""Old module names, which work for one release with a DeprecationWarning."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def forward(old: str, *new: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that takes its names from other modules.

    Args:
        old: the module's own name.
        new: names of the modules to take from; the first that has a name is used.
    """

    def get(name: str) -> Any:
        for target in () if name.startswith("__") else new:
            module = importlib.import_module(target)
            if hasattr(module, name):
                warnings.warn(f"{old} is deprecated: use {target}", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return get
