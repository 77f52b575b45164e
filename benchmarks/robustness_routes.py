"""The paths of an input of a robustness campaign: worker processes, ``cbedge serve`` and ``cbedge listen``."""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pydicom
from PIL import Image

from benchmarks.common import START_S, connects, free_port, ready, start_module, start_service
from benchmarks.listen_node import send
from benchmarks.mutations import MARKER, Input
from benchmarks.robustness_worker import copies, middle, peak_bytes, reset_peak


class WorkerRoute:
    """Inputs that one worker process gets."""

    def __init__(self, threads: int | None, limit_s: float):
        self.limit_s, self.words = limit_s, [threads] if threads else []
        self.process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = start_module("benchmarks.robustness_worker", *self.words, text=True, **streams)
        if self._line(START_S) != "ready\n":
            raise RuntimeError("a worker does not start: try python -m benchmarks.robustness_worker")
        return self.process

    def _line(self, seconds: float) -> str | None:
        """The next line; ``None`` if there is none in time, empty if the process has ended."""
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def answer(self, seed: int, made: Input, only: str | None) -> dict[str, Any]:
        """The worker's answer for an input, or how the worker ended."""
        process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([seed, made.index, only]) + "\n")
        process.stdin.flush()
        line = self._line(self.limit_s)
        if line:
            return json.loads(line)
        fault = "hang" if line is None else "crash"
        process.kill()
        code = process.wait()
        self.process = None
        return {"faults": [(fault, f"after {self.limit_s:.0f} s" if fault == "hang" else f"exit {code}")]}

    def close(self) -> None:
        """End the worker."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class ServiceRoute:
    """A process of ``cbedge serve`` or ``cbedge listen``, and its log."""

    def __init__(self, folder: Path, limit_s: float, is_up: Callable[[int], bool], *words: object):
        self.folder, self.limit_s, self.port, self.is_up, self.words = folder, limit_s, free_port(), is_up, words
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self._seen = 0
        self._start()

    def _start(self) -> None:
        self.process = start_service(self.log, self.is_up, self.port, *self.words)

    def answer(self, seed: int, made: Input, only: str | None) -> dict[str, Any]:
        """Send an input, and check the process and its new log lines."""
        reset_peak(self.process.pid)
        before = peak_bytes(self.process.pid)[0]
        try:
            result = self.attempt(made)
        except (TimeoutError, httpx.TimeoutException):
            result = {"faults": [("hang", f"no answer in {self.limit_s:.0f} s")]}
        except (OSError, httpx.HTTPError, ValueError) as error:
            result = {"code": 1, "status": 0, "error": f"connection ended: {type(error).__name__}"}
        if self.process.poll() is not None:
            result.setdefault("faults", []).append(("crash", f"exit {self.process.returncode}"))
            self._start()
        now, most = peak_bytes(self.process.pid)
        with open(self.log, "rb") as log:
            log.seek(self._seen)
            text = log.read()
            self._seen += len(text)
        logged = text.decode("utf-8", "replace")
        if MARKER in logged:
            result.setdefault("faults", []).append(("patient data", "in the log"))
        return {"stderr": logged.replace(MARKER, "NAME"), "held": most - before, "rss": now, **result}

    def attempt(self, made: Input) -> dict[str, Any]:
        """Send an input, and return the answer."""
        raise NotImplementedError

    def close(self) -> None:
        """End the service."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ServeRoute(ServiceRoute):
    """Inputs that ``cbedge serve`` gets, and raw HTTP requests."""

    def __init__(self, folder: Path, limit_s: float):
        super().__init__(folder, limit_s, ready, "serve", "--recent-studies", 0)
        self._truth: dict[int, Any] = {}

    def attempt(self, made: Input) -> dict[str, Any]:
        """Send an input, and return the answer."""
        if made.kind == "http":
            return self._raw(made.data)
        if made.film is not None and made.film not in self._truth:
            seen = []
            for copy in copies(made.film):
                buffer = io.BytesIO()
                Image.fromarray(copy).save(buffer, "PNG")
                values = self._post(buffer.getvalue(), "film.png", {}).json()
                seen.append((values["image_findings"] or [], values["finding_scores"] or {}))
            self._truth[made.film] = middle(seen)
        form = {k: v for k, v in made.options.items() if isinstance(v, str)}
        if "template" in made.options:
            form["template"] = made.options["template"].decode("utf-8", "replace")
        response = self._post(made.data, made.name, form)
        result = self._judged(response.status_code, response.text)
        if made.film is not None:
            result["truth"] = self._truth[made.film]
        if response.status_code == 200 and form.get("format", "json") == "json":
            values = response.json()
            result |= {"findings": values["image_findings"] or [], "scores": values["finding_scores"] or {}}
        return result

    def _post(self, image: bytes, name: str, form: dict[str, str]) -> httpx.Response:
        address = f"http://127.0.0.1:{self.port}/v1/reports"
        return httpx.post(address, files={"image": (name, image)}, data=form, timeout=self.limit_s)

    @staticmethod
    def _judged(status: int, body: str) -> dict[str, Any]:
        faults = [("5xx", f"{status}: {body[:300]}")] if status >= 500 else []
        if status >= 400 and MARKER in body:
            faults.append(("patient data", body[:300].replace(MARKER, "NAME")))
        error = "" if status < 400 else body.replace(MARKER, "NAME")
        return {"code": int(status >= 400), "status": status, "error": error, "faults": faults}

    def _raw(self, data: bytes) -> dict[str, Any]:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.settimeout(self.limit_s)
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while len(answer) < 2**20 and (part := connection.recv(65536)):
                answer += part
        match = re.match(rb"HTTP/1\.\d (\d{3})", answer)
        return self._judged(int(match[1]) if match else 0, answer.decode("utf-8", "replace"))


class ListenRoute(ServiceRoute):
    """Objects that ``cbedge listen`` gets by C-STORE, and raw bytes on its port."""

    accepted = 0

    def __init__(self, folder: Path, limit_s: float):
        words = ["listen", "--known", "CAMPAIGN", "--spool", folder / "spool", "--pair-wait", 0]
        super().__init__(folder, limit_s, connects, *words)

    def attempt(self, made: Input) -> dict[str, Any]:
        """Send an input, and return the answer."""
        if made.kind == "pdu":
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.settimeout(1)
                with contextlib.suppress(OSError):
                    connection.sendall(made.data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)
            return {"code": 1, "status": 0}
        status = self._store(made)
        result: dict[str, Any] = {"code": int(status != 0), "status": status or 0}
        if status != 0:
            return result
        self.accepted += 1
        end = time.monotonic() + self.limit_s
        while self._held() < self.accepted:
            if time.monotonic() > end:
                waiting = [p for p in (self.folder / "spool").rglob("*") if p.is_file()]
                what = f"{self.accepted} accepted, {self._held()} drafted or failed, {len(waiting)} files in the spool"
                self.accepted = self._held()
                return result | {"faults": [("hang" if waiting else "lost", what)]}
            time.sleep(0.02)
        return result

    def _held(self) -> int:
        spool = self.folder / "spool"
        return sum(p.suffix != ".txt" for name in ("outgoing", "failed") for p in (spool / name).glob("*"))

    def _store(self, made: Input) -> int | None:
        """Send the bytes of an object; returns the status, or ``None`` if the association could not send it."""
        syntax, start = str(pydicom.uid.ExplicitVRLittleEndian), 132
        with contextlib.suppress(Exception):
            meta = pydicom.dcmread(io.BytesIO(made.data), stop_before_pixels=True, force=True).file_meta
            start = 144 + int(meta.FileMetaInformationGroupLength)
            syntax = str(meta.TransferSyntaxUID)
        uid = pydicom.uid.generate_uid(entropy_srcs=[made.kind, str(made.index)])
        try:
            return send(self.port, [(uid, made.data[start:])], self.limit_s, "CAMPAIGN", syntax)[0]
        except ValueError:
            return None
