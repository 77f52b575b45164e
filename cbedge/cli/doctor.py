"""``cbedge doctor``: check this machine."""

from typing import Annotated

import typer

from cbedge.cli.options import Model


def doctor(model: Model = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check whether this machine can draft reports, and say how to fix what is wrong."""
    from dataclasses import asdict

    from cbedge.doctor import examine
    from cbedge.errors import CbedgeError

    checks = []
    for check in examine(model):
        checks.append(check)
        if not as_json:
            typer.echo(f"{check.state:8}{check.name}: {check.found}")
            if check.remedy:
                typer.echo(f"{'':8}{'':{len(check.name)}}  to do: {check.remedy}")
    if as_json:
        import json

        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    faults = sum(check.state == "fault" for check in checks)
    if faults:
        raise CbedgeError(f"{faults} of {len(checks)} checks failed: see above")
