"""``cbedge serve``: the HTTP service."""

from typing import Annotated

import typer

from cbedge.cli.options import Device, Model, OperatingPoint, Template, Variant, number
from cbedge.cli.terminal import keep_to_template
from cbedge.errors import OutputError, install_extra


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; other machines need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8642,
    model: Model = None,
    variant: Variant = None,
    device: Device = "auto",
    operating_point: OperatingPoint = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="CBEDGE_TOKEN", help="Token that clients must send; prefer the environment variable."),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Maximum number of waiting drafts; further requests get status 429.")
    ] = 8,
    deadline: Annotated[float, number(1, 86_400, "Time limit for a draft, in seconds.")] = 60.0,
    max_mb: Annotated[int, typer.Option(min=1, help="Maximum size of a request, in MB.")] = 64,
    idle: Annotated[float, number(0.1, 3600, "Seconds of silence before a client is disconnected.")] = 10.0,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that clients may use for the service; repeatable.",
            show_default="this machine's loopback names; any name with a token",
        ),
    ] = None,
    recent_studies: Annotated[
        int, typer.Option(min=0, max=64, help="Studies cached in memory, which makes drafting them again faster.")
    ] = 4,
    template: Template = None,
) -> None:
    """Serve drafts over HTTP, with a web page at http://127.0.0.1:8642."""
    try:
        from cbedge.services.http import check_exposure, run_server
        from cbedge.services.http_queue import ServeSettings
    except ImportError as error:
        raise OutputError(f"cbedge serve needs the package {error.name}; type: {install_extra('serve')}") from None
    check_exposure(host, token)
    from cbedge.api import ReportGenerator

    generator = ReportGenerator.from_pretrained(
        model, variant, device, recent_studies=recent_studies, operating_point=operating_point
    )
    generator = keep_to_template(generator, template)
    settings = ServeSettings(token, max_mb * 2**20, queue, deadline, idle, tuple(allowed_host or ()))
    run_server(generator, host, port, settings)
