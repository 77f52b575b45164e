"""Benchmark of drafts on this machine: time of each stage, memory use, and what limits the speed."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from cbedge.api import ReportGenerator
from cbedge.backends import choose_variant
from cbedge.backends.int8 import Table
from cbedge.bundles.bundle import Bundle, open_bundle
from cbedge.cores import usable_cores
from cbedge.decoding import Decoding
from cbedge.drafting.recent import Recent
from cbedge.errors import OutputError
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.report import Report, Timings

FORMATS = ("table", "json", "csv", "md")
STAGES = tuple(f.name for f in fields(Timings))
_BUFFER_BYTES = 256 * 2**20
Progress = Callable[[str], None]
# A small process between us and the command: the peak of a child begins with what its parent held.
_WATCH = """
import json, subprocess, sys, time
from cbedge.bench import _peak_memory
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, stdin=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps([seconds, _peak_memory(children=True), done.returncode, done.stdout, done.stderr]))
"""


def bench(
    images: Sequence[Radiograph],
    *,
    model: Path | None = None,
    variants: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    indication: str | None = None,
    tokens: int | None = None,
    warm_up: int = 2,
    repeat: int = 5,
    speculative: bool = True,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Draft every radiograph several times with each variant, in this process.

    Args:
        images: radiographs, read before; a draft's ``read`` stage is the time that reading took, once.
        model: folder of a bundle; ``None`` is the embedded one.
        variants: of the bundle; none stands for its default.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; ``None`` is one a core.
        indication: given with every radiograph.
        tokens: end every draft after so many tokens; ``None`` lets the model end its reports.
        warm_up: drafts before any is timed.
        repeat: times that every radiograph is drafted.
        speculative: let the phrasebook guess ahead.
        progress: is told what is being measured.

    Returns:
        A JSON-ready record: ``machine``, and ``variants`` with for each of them ``ms`` (median, p95, p99, least, most
        of every stage, of the time to the first token and of the whole), ``redraft_ms`` (of the whole where the study
        was the last one drafted, :mod:`cbedge.drafting.recent`), ``tokens_per_second``, ``peak_memory_mb``...

    Raises:
        BundleError, DeviceError: as :meth:`ReportGenerator.from_pretrained`.
    """
    bundle = open_bundle(model)
    names = [bundle.variant(name)[0] for name in variants] or [choose_variant(bundle, None, device)[0]]
    progress("memory bandwidth")
    bandwidth = read_bandwidth(threads)
    rows = []
    for name in names:
        progress(f"{name}: loading")
        start = perf_counter()
        generator = ReportGenerator.from_pretrained(model, name, device, threads, recent_studies=0)
        load = perf_counter() - start
        settings = replace(generator.decoding, speculative=speculative)

        def draft(image: Radiograph, write: ReportGenerator = generator, how: Decoding = settings) -> Report:
            return write.generate(
                image, indication=indication, max_new_tokens=tokens, decoding=how, accept_any_image=True
            )

        for image in [*images] * warm_up if len(images) < warm_up else images[:warm_up]:
            draft(image)
        drafts = []
        for number in range(repeat):
            progress(f"{name}: round {number + 1} of {repeat}")
            drafts += [draft(image) for image in images]
        rows.append(_row(generator, drafts, load, bandwidth))
        progress(f"{name}: again")
        generator.recent = Recent(1)
        rows[-1]["redraft_ms"] = _percentiles([draft(image).timings.total for image in images for _ in range(2)][1::2])
        generator.recent = Recent(0)
        del generator
    return {
        "machine": machine(bandwidth),
        "model": f"{bundle.manifest.name} {bundle.manifest.version}",
        "variants": rows,
        "images": len(images),
        "repeat": repeat,
        "warm_up": warm_up,
        "max_new_tokens": tokens,
        "speculative": speculative,
    }


def drawn_chest() -> Radiograph:
    """A synthetic image, two dark lungs in a bright body: suitable for timing only."""
    y, x = np.mgrid[0:512, 0:512] / 512
    pixels = np.full((512, 512), 0.8)
    for centre in (0.3, 0.7):
        pixels -= 0.5 * np.exp(-((((x - centre) / 0.13) ** 2 + ((y - 0.5) / 0.28) ** 2) ** 2))
    return load_radiograph((255 * pixels).astype(np.uint8))


def cold_start(image: Path | None, model: Path | None, variant: str, repeat: int) -> dict[str, Any]:
    """Run ``cbedge generate`` repeatedly in new processes: median seconds, and peak memory in MB.

    Raises:
        OutputError: the command fails; the message has its error message.
    """
    scratch = tempfile.TemporaryDirectory()
    if image is None:
        image = Path(scratch.name) / "chest.png"
        Image.fromarray((255 * drawn_chest().pixels).astype(np.uint8)).save(image)
    command = [sys.executable, "-m", "cbedge.cli", "generate", str(image), "--json", "--device", "cpu"]
    command += ["--variant", variant]
    command += ["--accept-any-image", *(["--model", str(model)] if model else [])]
    seconds, first, peaks = [], [], []
    for _ in range(repeat):
        watched = subprocess.run(
            [sys.executable, "-c", _WATCH, *command],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        took, peak, code, out, err = json.loads(watched.stdout)
        if code:
            raise OutputError(f"cbedge generate failed: {(err.strip().splitlines() or ['no message'])[-1]}")
        seconds.append(took)
        peaks.append(peak)
        first.append(took - json.loads(out)["timings_ms"]["decode"] / 1000)
    scratch.cleanup()
    return {
        "variant": variant,
        "runs": repeat,
        "command_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "first_token_s": statistics.median(first),
        "peak_memory_mb": max(peaks),
    }


def machine(bandwidth: float | None = None) -> dict[str, Any]:
    """The conditions of a measurement: processor, usable cores, memory, versions, date."""
    cores = usable_cores()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gb": _memory_gb(),
        "gpu": _gpu(),
        "read_bandwidth_gb_s": None if bandwidth is None else round(bandwidth / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {n: v for n in ("cbedge", "onnxruntime", "onnxruntime-gpu", "numpy") if (v := _version(n))},
        "date": date.today().isoformat(),
    }


def read_bandwidth(threads: int | None = None) -> float:
    """Memory read bandwidth of all cores in bytes per second: the best of five passes over 256 MB."""
    count = threads or usable_cores()
    parts = np.array_split(np.ones(_BUFFER_BYTES // 8), count)
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(5):
            start = perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BUFFER_BYTES / (perf_counter() - start))
    return best


def render(record: dict[str, Any], form: str, before: dict[str, Any] | None = None) -> str:
    """Format a record as ``json``, ``csv``, ``md`` or ``table``, compared with the older record ``before`` if given."""
    if form == "json":
        return json.dumps(record, indent=1)
    rows = _table(record, before)
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(rows)
        return file.getvalue().rstrip("\n")
    if form == "md":
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([f"{_title(record)}\n", head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *body])
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=_title(record), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=max(100, 30 + 24 * len(rows[0]))).print(table)
    return out.getvalue().rstrip("\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read an older record.

    Raises:
        OutputError: the file was not written by ``cbedge bench --format json``.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = [row["ms"]["total"]["median"] for row in record["variants"]], record["machine"]["processor"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} was not written by cbedge bench --format json ({type(error).__name__}): give such a file"
        ) from None
    return record


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot the median time of each stage and variant as a PNG.

    Raises:
        OutputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise OutputError("a plot needs matplotlib; type: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["variants"]
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.6 * len(rows)))
    left = np.zeros(len(rows))
    for stage in STAGES[:-1]:
        widths = np.array([row["ms"][stage]["median"] for row in rows])
        axes.barh([row["variant"] for row in rows], widths, left=left, label=stage)
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel="ms, median", title=_title(record).split(". ")[0])
    axes.legend(ncols=len(STAGES) - 1, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _row(generator: ReportGenerator, drafts: list[Report], load: float, bandwidth: float) -> dict[str, Any]:
    spans = {stage: [asdict(d.timings)[stage] for d in drafts] for stage in STAGES}
    first = [sum(asdict(d.timings)[stage] for stage in ("read", "vision", "qformer", "prefill")) for d in drafts]
    # The stop token counts; opening tokens do not, because they were not generated.
    written = [max(1, d.new_tokens - d.opening_tokens + d.complete) for d in drafts]
    # Without speculative decoding, each token but the first needs a pass. With it, a pass yields one token and the
    # accepted guesses, some of which the sentence filter may remove.
    decoded = [max(d.passes + d.accepted_tokens, n - 1) for n, d in zip(written, drafts, strict=True)]
    passes = [d.passes or n for n, d in zip(decoded, drafts, strict=True)]
    decode_s = [max(d.timings.decode, 1e-3) / 1000 for d in drafts]
    read = _bytes_per_pass(generator.bundle, generator.variant, statistics.fmean(d.prompt_tokens for d in drafts))
    used = statistics.median(read * n / s for n, s in zip(passes, decode_s, strict=True))
    guessed = sum(d.guessed_tokens for d in drafts)
    return {
        "variant": generator.variant,
        "device": generator.backend.device,
        "threads": generator.backend.threads,
        "drafts": len(drafts),
        "load_s": round(load, 3),
        "ms": {name: _percentiles(values) for name, values in {**spans, "first token": first}.items()},
        "prompt_tokens": statistics.median(d.prompt_tokens for d in drafts),
        "new_tokens": statistics.median(d.new_tokens for d in drafts),
        "tokens_per_second": _percentiles([n / s for n, s in zip(decoded, decode_s, strict=True)]),
        # None if the drafts consist of openings only: nothing was decoded.
        "tokens_per_pass": round(sum(decoded) / sum(passes), 2) if sum(passes) else None,
        "guesses_accepted": round(sum(d.accepted_tokens for d in drafts) / guessed, 3) if guessed else None,
        "bytes_per_pass": read,
        "bandwidth_share": round(used / bandwidth, 3) if generator.backend.device == "cpu" else None,
        "peak_memory_mb": _peak_memory(),
        "gpu_memory_mb": _gpu_memory() if generator.backend.device == "cuda" else None,
    }


def _table(record: dict[str, Any], before: dict[str, Any] | None) -> list[list[str]]:
    old = {row["variant"]: row for row in (before or {}).get("variants", ())}
    rows = [["", *(f"{row['variant']}, {row['device']}" for row in record["variants"])]]

    def add(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        rows.append([title, *(cell(row) for row in record["variants"])])

    for stage in (*STAGES[:-1], "first token", "total"):
        rows.append([f"{stage}, ms", *(_cell(row, old.get(row["variant"]), stage) for row in record["variants"])])
    if any("redraft_ms" in row for row in record["variants"]):
        add("total, same study again, ms", lambda row: _or_dash(row["redraft_ms"]["median"], "{:.1f}"))
    add("tokens/s while decoding", lambda row: f"{row['tokens_per_second']['median']:.0f}")
    add("prompt tokens, new tokens", lambda row: f"{row['prompt_tokens']:.0f}, {row['new_tokens']:.0f}")
    add("tokens per pass (guesses accepted)", _guessing)
    add("MB read per pass", lambda row: f"{row['bytes_per_pass'] / 1e6:.1f}")
    add("share of memory bandwidth", lambda row: _or_dash(row["bandwidth_share"], "{:.0%}"))
    add("loading, s", lambda row: f"{row['load_s']:.2f}")
    add("peak memory, MB", lambda row: f"{row['peak_memory_mb']:.0f}")
    if any(row["gpu_memory_mb"] for row in record["variants"]):
        add("GPU memory, MB", lambda row: _or_dash(row["gpu_memory_mb"], "{:.0f}"))
    if cold := record.get("cold"):
        rows.append(["cold start of the command, s", f"{cold['command_s']:.2f}", *[""] * (len(rows[0]) - 2)])
        rows.append(["cold start, peak memory, MB", f"{cold['peak_memory_mb']:.0f}", *[""] * (len(rows[0]) - 2)])
    return rows


def _cell(row: dict[str, Any], old: dict[str, Any] | None, stage: str) -> str:
    percentiles = row["ms"][stage]
    text = f"{percentiles['median']:.1f} (p95 {percentiles['p95']:.1f}, p99 {percentiles['p99']:.1f})"
    if old and old["ms"].get(stage, {}).get("median"):
        text += f", {percentiles['median'] / old['ms'][stage]['median']:.2f} x before"
    return text


def _guessing(row: dict[str, Any]) -> str:
    return f"{_or_dash(row['tokens_per_pass'], '{:.2f}')} ({_or_dash(row['guesses_accepted'], '{:.0%}')})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _title(record: dict[str, Any]) -> str:
    where = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    bandwidth = f"{where['read_bandwidth_gb_s']:.0f} GB/s" if where["read_bandwidth_gb_s"] else ""
    parts = [where["processor"], f"{where['cores']} cores", bandwidth, where["gpu"] or "", versions, where["date"]]
    drafts = f"{record['images']} radiographs x {record['repeat']} drafts"
    return f"{record['model']}, median of {drafts}. " + ", ".join(filter(None, parts))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    p95, p99 = np.percentile(values, (95, 99))
    found = {"median": statistics.median(values), "p95": p95, "p99": p99, "least": min(values), "most": max(values)}
    return {name: round(float(value), 3) for name, value in found.items()}


def _bytes_per_pass(bundle: Bundle, variant: str, length: float) -> int:
    """Bytes that one decoder pass reads: all weights, and the KV cache."""
    chosen = bundle.manifest.variants[variant]
    graphs = {chosen.graphs["decoder_model_merged"]} if chosen.graphs else set(chosen.data)
    names = graphs | {n for n in chosen.data if n.startswith("decoder_model_merged")}
    tables = [Table.read(bundle.folder / name) for name in names if name.endswith(".json")]
    wider = sum(p.rows * p.columns - p.stored_bytes for table in tables for p in table.products)  # made at loading
    shapes = bundle.manifest.shapes
    cache = 2 * shapes.num_layers * shapes.num_key_value_heads * shapes.head_size * 4 * length
    return int(sum(bundle.manifest.files[name].size for name in names) + wider + cache)


def _peak_memory(children: bool = False) -> float:
    """Peak resident memory of this process, or of its finished children, in MB."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes there, kilobytes elsewhere
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return round(usage.ru_maxrss * unit / 1e6, 1)


def _gpu() -> str | None:
    return _nvidia_smi("--query-gpu=name")


def _gpu_memory() -> float | None:
    for line in (_nvidia_smi("--query-compute-apps=pid,used_memory", first=False) or "").splitlines():
        process, _, used = line.partition(",")
        if process.strip() == str(os.getpid()) and used.split():
            return float(used.split()[0]) * 2**20 / 1e6
    return None


def _nvidia_smi(query: str, first: bool = True) -> str | None:
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return None if done.returncode or not text else text.splitlines()[0] if first else text


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
