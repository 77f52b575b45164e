"""``cbedge model``: describe and verify a model."""

from typing import Annotated

import typer

from cbedge.cli.options import Model
from cbedge.errors import DeviceError


def model(
    model: Model = None,
    card: Annotated[bool, typer.Option("--card", help="Print the whole model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Describe a model, and verify all its files."""
    from cbedge.backends import choose_variant
    from cbedge.bundles.bundle import CARD, open_bundle
    from cbedge.bundles.manifest import MANIFEST

    bundle = open_bundle(model)
    if card or as_json:
        bundle.verify((CARD,))
        typer.echo((bundle.folder / (CARD if card else MANIFEST)).read_text(encoding="utf-8"), nl=False)
        return
    bundle.verify()
    manifest = bundle.manifest
    typer.echo(f"{manifest.name} {manifest.version} ({manifest.license})")
    try:
        here = choose_variant(bundle)[0]
    except DeviceError:  # no ONNX Runtime
        here = manifest.default_variant
    for name, variant in manifest.variants.items():
        size = sum(manifest.files[file].size for file in bundle.variant_files(variant))
        default = ", default on this machine" if name == here else ""
        typer.echo(f"  {name}: {variant.description}, {size / 1e6:.1f} MB{default}")
    for base in manifest.base_weights:
        typer.echo(f"  based on {base['origin']} ({base['licence']})")
    for data in manifest.training_data:
        typer.echo(f"  trained on {data['name']} ({data['licence']})")
    for row, scores in manifest.quality.get("scores", {}).items():
        typer.echo(f"  {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    typer.echo(f"{len(manifest.files)} files verified (SHA-256) in {bundle.folder}")
    typer.echo("Model card: cbedge model --card")
