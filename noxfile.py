"""One command for each chore: `nox -s lint types tests wheel docs`. Sessions run in the active environment."""

import shutil
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]
MAX_WHEEL_BYTES = 100_000_000


@nox.session
def lint(session: nox.Session) -> None:
    """Check the linter's rules, the formatting, the dependencies between packages, and the figures of the docs."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("python", "-m", "benchmarks.figures", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, those of the runtime strictly."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite without the slow tests, or what is named after ``--``: ``-- -m slow``, ``-- --cov``."""
    session.run("pytest", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, with the model in it, and check its size."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--wheel", "--outdir", folder, ".", silent=True)
        (built,) = Path(folder).glob("*.whl")
        size = built.stat().st_size
        session.log(f"{built.name}: {size:,} bytes")
        if size >= MAX_WHEEL_BYTES:
            session.error(f"the wheel has {size:,} bytes; at most {MAX_WHEEL_BYTES:,} are allowed")
    shutil.rmtree("build", ignore_errors=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into ``site/``, or ``-- serve`` it; needs the extra ``docs``."""
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]))
