"""``cbedge listen``: the DICOM node."""

from pathlib import Path
from typing import Annotated

import typer

from cbedge.cli.options import Device, Model, OperatingPoint, Template, Unassessed, Variant, number
from cbedge.cli.terminal import keep_to_template
from cbedge.errors import OutputError, install_extra


def listen(
    known: Annotated[list[str], typer.Option("--known", help="AE title of a node that may send images; repeatable.")],
    spool: Annotated[Path, typer.Option(help="Folder for received radiographs and undelivered drafts.")],
    peer: Annotated[
        str | None,
        typer.Option(help="PACS that receives the drafts, as AET@host:port.", show_default="drafts stay in the spool"),
    ] = None,
    aet: Annotated[str, typer.Option(help="This node's AE title.")] = "CBEDGE",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 11112,
    model: Model = None,
    variant: Variant = None,
    device: Device = "auto",
    operating_point: OperatingPoint = None,
    retry: Annotated[float, number(0.1, 600, "Seconds until a failed delivery is first retried.")] = 5.0,
    pair_wait: Annotated[
        float, number(0, 86_400, "Seconds to wait for the other view of a study; 0 drafts every view alone.")
    ] = 10.0,
    template: Template = None,
    unassessed: Unassessed = "mark",
) -> None:
    """Run a DICOM node: draft a report for each CR or DX image received, and send it on as a Structured Report."""
    try:
        from cbedge.services.delivery import Peer
        from cbedge.services.dicom_node import ListenSettings, run_listener
    except ImportError as error:
        raise OutputError(f"cbedge listen needs the package {error.name}; type: {install_extra('hospital')}") from None
    from cbedge.api import ReportGenerator
    from cbedge.outputs import check_format

    check_format("sr")
    node = Peer.parse(peer) if peer else None
    settings = ListenSettings(
        aet, host, port, tuple(known), node, spool, retry, pair_wait_s=pair_wait, unassessed=unassessed
    )
    run_listener(
        keep_to_template(
            ReportGenerator.from_pretrained(model, variant, device, operating_point=operating_point), template
        ),
        settings,
    )
