"""Check whether this machine can run cbedge, by running it; every fault comes with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, cast

from cbedge.bench import drawn_chest
from cbedge.bundles.bundle import Bundle, open_bundle
from cbedge.cores import cpu_quota
from cbedge.errors import CbedgeError, install_extra
from cbedge.machine import machine

State = Literal["ok", "warning", "fault"]
_LEAST_MEMORY_GB = 1.0
_LEAST_DISK_GB = 0.5
_TOKENS = 8


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        state: ``ok``; ``warning``: drafts still work; ``fault``: they do not.
        found: the result in words.
        remedy: what to type or do; empty if nothing, or if ``found`` is an error message, which says it.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(model: Path | None = None) -> Iterator[Check]:
    """Check Python, ONNX Runtime, the machine and the model's files, and draft a report on every device."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    runtime = _runtime()
    yield runtime
    yield _memory()
    yield _disk()
    yield _network()
    try:
        bundle = open_bundle(model)
    except CbedgeError as error:
        yield Check("model", "fault", str(error))
        return
    yield _files(bundle)
    if runtime.state != "fault":
        yield _draft("cpu", model)
        yield from _cuda(model)


def _runtime() -> Check:
    from cbedge.backends.provider import check_runtime

    try:
        check_runtime()
        import onnxruntime
    except CbedgeError as error:
        return Check("onnxruntime", "fault", str(error))
    except ImportError as error:
        return Check(
            "onnxruntime", "fault", f"it cannot be imported ({error})", "pip install --force-reinstall onnxruntime"
        )
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Check("onnxruntime", "ok", f"{onnxruntime.__version__}, built for {providers}")


def _memory() -> Check:
    where = machine()
    quota = cpu_quota()
    limit = "" if quota is None else f" (CPU quota {quota:.1f})"
    described = f"{where['memory_gb']} GB, {where['cores']} cores{limit}, {where['processor']}"
    free = _free_memory_gb()
    if free is not None and free < _LEAST_MEMORY_GB:
        return Check(
            "memory",
            "warning",
            f"{free:.1f} GB free of {described}",
            "close other programs: a draft needs about 0.4 GB",
        )
    return Check("memory", "ok", described)


def _disk() -> Check:
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < _LEAST_DISK_GB:
        return Check("disk", "warning", f"{free:.1f} GB free in {tempfile.gettempdir()}", "free some space there")
    return Check("disk", "ok", f"{free:.0f} GB free in {tempfile.gettempdir()}")


def _network() -> Check:
    if os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
        return Check("network", "warning", "ONNX Runtime's telemetry is on", "unset ORT_DISABLE_TELEMETRY")
    return Check("network", "ok", "drafting uses no network; ONNX Runtime's telemetry is off")


def _files(bundle: Bundle) -> Check:
    try:
        bundle.verify()
    except CbedgeError as error:
        return Check("model", "fault", str(error))
    manifest = bundle.manifest
    size = sum(record.size for record in manifest.files.values()) / 1e6
    return Check(
        "model", "ok", f"{manifest.name} {manifest.version}, {len(manifest.files)} files, {size:.0f} MB, all verified"
    )


def _cuda(model: Path | None) -> Iterator[Check]:
    import onnxruntime

    gpu = machine()["gpu"]
    built = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if built:
        yield _draft("cuda", model)
    elif gpu:
        yield Check(
            "draft on cuda",
            "warning",
            f"this machine has a GPU ({gpu}), but the CPU build of ONNX Runtime is installed",
            f"pip uninstall -y onnxruntime, then {install_extra('gpu')}",
        )


def _draft(device: str, model: Path | None) -> Check:
    """Draft a few tokens from a synthetic image, through the public interface."""
    from cbedge.api import ReportGenerator

    name, failure = f"draft on {device}", cast(State, "fault" if device == "cpu" else "warning")
    try:
        start = perf_counter()
        generator = ReportGenerator.from_pretrained(model, device=device)
        loaded = perf_counter()
        report = generator.generate(drawn_chest(), max_new_tokens=_TOKENS, accept_any_image=True)
    except CbedgeError as error:
        return Check(name, failure, str(error))
    except Exception as error:  # the runtime may raise anything; the user must see it
        first_line = str(error).splitlines()[0] if str(error) else ""
        remedy = "update the driver of the device, and install cbedge again"
        return Check(name, failure, f"{type(error).__name__}: {first_line}", remedy)
    took = f"loaded in {loaded - start:.1f} s, a draft of at most {_TOKENS} tokens in {report.timings.total:.0f} ms"
    return Check(name, "ok", f"{report.variant}: {took}")


def _free_memory_gb() -> float | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (AttributeError, ValueError, OSError):
        return None
