"""cbedge drafts chest radiograph reports on one workstation, offline.

>>> from cbedge import ReportGenerator
>>> report = ReportGenerator.from_pretrained().generate("chest_pa.png", indication="cough")

Names are imported on first use, so that ``import cbedge`` is fast.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbedge.api import DraftRequest as DraftRequest
    from cbedge.api import ReportGenerator as ReportGenerator
    from cbedge.api import ReportStream as ReportStream
    from cbedge.bundles.bundle import Bundle as Bundle
    from cbedge.bundles.bundle import open_bundle as open_bundle
    from cbedge.errors import BundleError as BundleError
    from cbedge.errors import CbedgeError as CbedgeError
    from cbedge.errors import ContextError as ContextError
    from cbedge.errors import DeviceError as DeviceError
    from cbedge.errors import DraftError as DraftError
    from cbedge.errors import OptionError as OptionError
    from cbedge.errors import OutputError as OutputError
    from cbedge.errors import RadiographError as RadiographError
    from cbedge.images.radiograph import Radiograph as Radiograph
    from cbedge.images.radiograph import load_radiograph as load_radiograph
    from cbedge.prompt import ClinicalContext as ClinicalContext
    from cbedge.report import Report as Report
    from cbedge.report import Timings as Timings

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

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cbedge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cbedge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
