"""A process of ``cbedge listen`` and a small PACS for its Structured Reports, for the benchmarks of the DICOM node."""

from __future__ import annotations

import io
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    DigitalXRayImageStorageForPresentation,
    EnhancedSRStorage,
)

from benchmarks.common import connects, free_port, start_service
from benchmarks.mutations import film


class Pacs:
    """Receives Structured Reports and counts them.

    Attributes:
        images: number of deliveries by SOP Instance UID of the radiograph.
        documents: SOP Instance UIDs of the documents of each radiograph.
    """

    def __init__(self, port: int):
        self.images: Counter[str] = Counter()
        self.documents: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        node = AE("PACS")
        node.add_supported_context(EnhancedSRStorage)
        handlers: Any = [(evt.EVT_C_STORE, self._store)]
        self._server: Any = node.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)

    def _store(self, event: evt.Event) -> int:
        document = event.dataset
        series = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
        image = str(series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        with self._lock:
            self.images[image] += 1
            self.documents.setdefault(image, set()).add(str(document.SOPInstanceUID))
        return 0x0000

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()


class Node:
    """A process of ``cbedge listen`` with the embedded model; its spool is kept when it ends."""

    def __init__(self, folder: Path, pacs_port: int):
        self.port, self.spool, self.log = free_port(), folder / "spool", folder / "log"
        options = ["--spool", self.spool, "--peer", f"PACS@127.0.0.1:{pacs_port}", "--retry", 0.5, "--pair-wait", 0]
        self.process = start_service(self.log, connects, self.port, "listen", "--known", "SENDER", *options)

    def kill(self) -> None:
        """End it at once, like a loss of power."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it like a service manager."""
        self.process.terminate()
        self.process.wait(90)

    def failed(self) -> set[str]:
        """SOP Instance UIDs of the radiographs that were moved to ``failed``."""
        return {path.stem for path in (self.spool / "failed").glob("*.dcm")}

    def unfinished(self) -> int:
        """Number of radiographs and drafts that wait."""
        return sum(1 for part in ("incoming", "outgoing") for _ in (self.spool / part).glob("*.dcm"))


def radiograph(number: int) -> Dataset:
    """A Digital X-Ray object of the example film, slightly different for each number, without identifiers."""
    values = np.round(film(number) * 255).astype(np.uint8)
    dataset = Dataset()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.Modality, dataset.ViewPosition, dataset.BodyPartExamined = "DX", "PA", "CHEST"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = "A^B", "1", "19700101", "F"
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = "20260102", "101112", "1", "1"
    dataset.ReferringPhysicianName, dataset.SeriesNumber, dataset.InstanceNumber = "", 1, 1
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = values.tobytes() + b"\0" * (values.size % 2)
    return dataset


def encode(dataset: Dataset) -> bytes:
    """The data set as it is sent over the network, without a file header."""
    buffer = io.BytesIO()
    dcmwrite(buffer, Dataset(dict(dataset)), implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def send(
    port: int,
    objects: Iterable[tuple[str, bytes]],
    timeout_s: float = 120,
    title: str = "SENDER",
    syntax: str = ExplicitVRLittleEndian,
) -> list[int | None]:
    """Send objects over one association, whatever their bytes are.

    Args:
        objects: SOP Instance UID and encoded data set of each.
        syntax: transfer syntax that is announced for the data sets.

    Returns:
        The status of each object; ``None`` if the node did not answer.

    Raises:
        ValueError: ``syntax`` is not a transfer syntax.
    """
    _config.STORE_SEND_CHUNKED_DATASET = True  # send the bytes of files unchanged
    objects = list(objects)
    node = AE(title)
    node.acse_timeout = 15  # a node that was killed does not answer
    node.dimse_timeout = node.network_timeout = timeout_s
    node.add_requested_context(DigitalXRayImageStorageForPresentation, UID(syntax))
    association = node.associate("127.0.0.1", port, ae_title="CBEDGE")
    answers: list[int | None] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (uid, content) in enumerate(objects):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
            meta.MediaStorageSOPInstanceUID = UID(uid)
            meta.TransferSyntaxUID = UID(syntax)
            path = Path(folder) / f"{number}.dcm"
            header = DicomBytesIO()
            write_file_meta_info(header, meta)
            path.write_bytes(b"\0" * 128 + b"DICM" + header.getvalue() + content)
            try:
                answers.append(association.send_c_store(path).get("Status"))
            except RuntimeError:  # the association has ended
                break
            except struct.error:  # the sender itself cannot read such an object
                answers.append(None)
    if association.is_established:
        association.release()
    return answers + [None] * (len(objects) - len(answers))
