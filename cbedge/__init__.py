"""cbedge drafts chest radiograph reports on one workstation, offline.

>>> from cbedge import ReportGenerator
>>> report = ReportGenerator.from_pretrained().generate("chest_pa.png", indication="cough")

Names are imported on first use, so that ``import cbedge`` is fast.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbedge.api import DraftRequest, ReportGenerator, ReportStream
    from cbedge.bundles.bundle import Bundle, open_bundle
    from cbedge.errors import (
        BundleError,
        CbedgeError,
        ContextError,
        DeviceError,
        DraftError,
        OptionError,
        OutputError,
        RadiographError,
    )
    from cbedge.images.radiograph import Radiograph, load_radiograph
    from cbedge.prompt import ClinicalContext
    from cbedge.report import Report, Timings

__version__ = "0.2.0"

# cbedge uses no network; ONNX Runtime sends telemetry on some platforms unless this is set before its import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_HOMES = {
    "ReportGenerator": "api",
    "ReportStream": "api",
    "DraftRequest": "api",
    "Report": "report",
    "Timings": "report",
    "ClinicalContext": "prompt",
    "Radiograph": "images.radiograph",
    "load_radiograph": "images.radiograph",
    "Bundle": "bundles.bundle",
    "open_bundle": "bundles.bundle",
    "CbedgeError": "errors",
    "RadiographError": "errors",
    "ContextError": "errors",
    "BundleError": "errors",
    "DeviceError": "errors",
    "DraftError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
}

__all__ = [
    "Bundle",
    "BundleError",
    "CbedgeError",
    "ClinicalContext",
    "ContextError",
    "DeviceError",
    "DraftError",
    "DraftRequest",
    "OptionError",
    "OutputError",
    "Radiograph",
    "RadiographError",
    "Report",
    "ReportGenerator",
    "ReportStream",
    "Timings",
    "__version__",
    "load_radiograph",
    "open_bundle",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cbedge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cbedge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
