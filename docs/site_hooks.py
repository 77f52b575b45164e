"""What the site has beside the pages in this folder: the changelog, pictures, and the commands' help texts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import app as typer_command
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
EXAMPLES = ("normal", "effusion", "cardiomegaly", "mass", "pneumothorax")
FROM_ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "images/chest_pa.png": "examples/chest_pa.png",
    **{f"images/nih_{name}.jpg": f"examples/nih/{name}.jpg" for name in EXAMPLES},
    "images/peers.png": "benchmarks/results/peers.png",
    "images/learning_curve.png": "benchmarks/results/learning_curve.png",
    "images/findings.png": "benchmarks/results/findings.png",
}


def on_startup(command: str, dirty: bool) -> None:
    """Let the packages of this folder be imported: training and export are not installed."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files of other folders, so that none is kept twice."""
    for name, source in FROM_ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each ``<!-- commands: MODULE as COMMAND -->`` by help texts; find pictures where the site has them."""
    for name, source in FROM_ELSEWHERE.items():
        markdown = markdown.replace(f"../{source}", name)
    return re.sub(r"<!-- commands: (\S+) as (.+?) -->", lambda found: _commands(*found.groups()), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the cross-references of docstrings, such as ``:class:`Report` ``, as plain names."""
    return re.sub(r":(?:class|meth|func|mod|attr|data|exc):<code>~?([^<]+)</code>", _name, html)


def _name(found: re.Match[str]) -> str:
    target = found.group(1)
    short = target.rpartition(".")[2] if found.group(0).find("~") >= 0 else target
    return f"<code>{short}</code>"


def _commands(module: str, command: str) -> str:
    words = [module, "utils", "docs", "--name", command]
    run = CliRunner().invoke(typer_command, words, catch_exceptions=False)
    if run.exit_code:
        raise ValueError(f"typer {' '.join(words)}: {run.output}")
    text = run.stdout.replace(str(Path.home()), "~").replace("{", "&#123;")
    return re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE)
