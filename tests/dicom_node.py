"""Fixtures and helpers of the tests of ``cbedge listen``: a film, a node in a process of its own or in this one."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from conftest import EXAMPLES, ROOT, free_port, wait_for
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import ComputedRadiographyImageStorage, Verification

from cbedge import ReportGenerator
from cbedge.services.dicom_node import Listener, ListenSettings


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = pydicom.dcmread(EXAMPLES / "chest_pa.dcm")
    dataset.decompress()
    path = tmp_path_factory.mktemp("film") / "film.dcm"
    dataset.save_as(path)
    return path


def another(film: Path) -> pydicom.Dataset:
    dataset = pydicom.dcmread(film)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    return dataset


def another_bytes(film: Path, uid: str) -> bytes:
    dataset, buffer = another(film), io.BytesIO()
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.save_as(buffer)
    return buffer.getvalue()


def send(port: int, dataset: pydicom.Dataset, aet: str = "MODALITY") -> int | None:
    node = AE(aet)
    node.add_requested_context(ComputedRadiographyImageStorage, ExplicitVRLittleEndian)
    association = node.associate("127.0.0.1", port, ae_title="CBEDGE")
    if not association.is_established:
        return None
    status = association.send_c_store(dataset).Status
    association.release()
    return status


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_done(spool: Path) -> bool:
    """Whether nothing waits to be drafted or delivered; in this order, as drafts move on meanwhile."""
    return not any([*(spool / part).glob("*.dcm")] for part in ("incoming", "outgoing"))


@pytest.fixture
def listen(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[int, subprocess.Popen]]]:
    running = []

    def start(pacs: int, spool: Path = tmp_path / "spool", wait: float = 0) -> tuple[int, subprocess.Popen]:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "cbedge.cli",
            "listen",
            "--known",
            "MODALITY",
            "--spool",
            spool,
            "--peer",
            f"PACS@127.0.0.1:{pacs}",
            "--port",
            port,
            "--model",
            tiny_bundle,
            "--device",
            "cpu",
            "--retry",
            "0.3",
            "--pair-wait",
            wait,
        ]
        log = open(tmp_path / "log", "a")  # noqa: SIM115
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=log)
        running.append(process)

        def answers() -> bool:
            node = AE("MODALITY")
            node.add_requested_context(Verification)
            association = node.associate("127.0.0.1", port, ae_title="CBEDGE")
            answered = association.is_established
            if answered:
                association.release()
            return answered

        wait_for(answers)
        return port, process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def receiver(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """Starts a node in this process, which sends nothing."""
    started = []

    def start(**options: object) -> Listener:
        settings = ListenSettings("CBEDGE", "127.0.0.1", free_port(), ("MODALITY",), None, tmp_path / "spool")
        settings = dataclasses.replace(settings, pair_wait_s=0, **options)
        started.append(Listener(ReportGenerator.from_pretrained(tiny_bundle, device="cpu"), settings))
        started[-1].start()
        return started[-1]

    yield start
    for listener in started:
        listener.stop()
