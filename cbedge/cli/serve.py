"""``cbedge serve``: the http service."""

from typing import Annotated

import typer

from cbedge.cli.options import Model, Template
from cbedge.cli.terminal import keep_to_template
from cbedge.errors import OutputError


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; off this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8642,
    model: Model = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the model.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    token: Annotated[
        str | None, typer.Option(envvar="CBEDGE_TOKEN", help="What clients must send; better set as CBEDGE_TOKEN.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Drafts that may wait; one more is answered 429.")] = 8,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until a draft is given up.")] = 60.0,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest request that is read, in MB.")] = 64,
    idle: Annotated[float, typer.Option(min=0.1, help="Seconds until a client that sends nothing is cut off.")] = 10.0,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which clients may address the service; may be repeated.",
            show_default="this machine's loopback names; any name with a token",
        ),
    ] = None,
    recent_studies: Annotated[
        int, typer.Option(min=0, max=64, help="Studies kept in memory, to be drafted again sooner.")
    ] = 4,
    template: Template = None,
) -> None:
    """Serve drafts over HTTP, with a page to try it: http://127.0.0.1:8642."""
    try:
        from cbedge.services.http import ServeSettings, check_exposure, run_server
    except ImportError as error:
        raise OutputError(f'cbedge serve needs the package {error.name}; type: pip install "cbedge[serve]"') from None
    check_exposure(host, token)
    from cbedge.api import ReportGenerator

    generator = ReportGenerator.from_pretrained(model, variant, device, recent_studies=recent_studies)
    generator = keep_to_template(generator, template)
    settings = ServeSettings(token, max_mb * 2**20, queue, deadline, idle, tuple(allowed_host or ()))
    run_server(generator, host, port, settings)
