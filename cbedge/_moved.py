"""Old module names, which work for one release with a DeprecationWarning."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def forward(old: str, *new: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of the module ``old``, which takes its names from the first other module that has them."""

    def get(name: str) -> Any:
        for target in () if name.startswith("__") else new:
            module = importlib.import_module(target)
            if hasattr(module, name):
                warnings.warn(f"{old} is deprecated: use {target}", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return get
