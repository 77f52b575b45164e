"""A script for the PACS side: fetch a study's radiographs from the PACS, draft each, send the drafts back.

In the clone, ``pip install -c constraints.txt ".[cpu,hospital]"``, then
``python examples/pacs_drafts.py PACS@10.0.0.5:104 STUDY_INSTANCE_UID --aet CBEDGE``. It asks by C-GET, so the PACS
needs no way back to this machine, but must know the title. ``cbedge listen`` is the service that waits for radiographs.
"""

from __future__ import annotations

import argparse
import io
import sys

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    EnhancedSRStorage,
    StudyRootQueryRetrieveInformationModelGet,
)

from cbedge import CbedgeError, ReportGenerator
from cbedge.outputs import render
from cbedge.services.dicom_node import Peer

RADIOGRAPHS = (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation)
SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
)


def fetch(pacs: Peer, aet: str, study: str) -> list[bytes]:
    """The DICOM files of a study's radiographs, by C-GET.

    Raises:
        ConnectionError: the PACS does not answer, or refuses.
    """
    node = AE(aet)
    node.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
    for kind in RADIOGRAPHS:
        for syntax in SYNTAXES:  # each by itself, for a PACS that sends what it holds and converts nothing
            node.add_requested_context(kind, syntax)
    files = []

    def take(event: evt.Event) -> int:
        files.append(event.encoded_dataset())
        return 0x0000

    roles = [build_role(kind, scp_role=True) for kind in RADIOGRAPHS]
    association = node.associate(
        pacs.host, pacs.port, ae_title=pacs.aet, ext_neg=roles, evt_handlers=[(evt.EVT_C_STORE, take)]
    )
    if not association.is_established:
        raise ConnectionError(f"{pacs.aet} at {pacs.host}:{pacs.port} does not take the association: see its log")
    wanted = Dataset()
    wanted.QueryRetrieveLevel, wanted.StudyInstanceUID = "STUDY", study
    last = None
    for status, _ in association.send_c_get(wanted, StudyRootQueryRetrieveInformationModelGet):
        last = status.Status if status else None
    association.release()
    if last is None or (last != 0x0000 and not files):
        raise ConnectionError(f"{pacs.aet} ended the transfer (status {'none' if last is None else f'{last:#06x}'})")
    return files


def send(pacs: Peer, aet: str, document: bytes) -> None:
    """Store one Structured Report.

    Raises:
        ConnectionError: the PACS does not answer, or refuses it.
    """
    import pydicom

    node = AE(aet)
    node.add_requested_context(EnhancedSRStorage, ExplicitVRLittleEndian)
    association = node.associate(pacs.host, pacs.port, ae_title=pacs.aet)
    if not association.is_established:
        raise ConnectionError(f"{pacs.aet} at {pacs.host}:{pacs.port} does not take the association: see its log")
    status = association.send_c_store(pydicom.dcmread(io.BytesIO(document)))
    association.release()
    if status.get("Status") != 0x0000:
        raise ConnectionError(f"{pacs.aet} does not store the draft")


def main() -> None:
    """Fetch, draft, send."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pacs", help="AET@host:port")
    parser.add_argument("study", help="Study Instance UID")
    parser.add_argument("--aet", default="CBEDGE", help="this script's own title")
    arguments = parser.parse_args()
    try:
        pacs = Peer.parse(arguments.pacs)
        files = fetch(pacs, arguments.aet, arguments.study)
        if not files:
            sys.exit("error: the study has no CR or DX image")
        generator = ReportGenerator.from_pretrained()
        for file in files:
            send(pacs, arguments.aet, render(generator.generate(file), "sr", file))
            print("a draft was stored")
    except (CbedgeError, ConnectionError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
