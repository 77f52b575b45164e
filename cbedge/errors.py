"""Errors that cbedge raises. Each message says what is wrong, with what, and what to do."""


def install_extra(extra: str) -> str:
    """What to type to install an extra such as ``serve``: in a clone, or from a folder of wheels."""
    return (
        f'pip install -c constraints.txt ".[{extra}]" in the clone, or from a folder of wheels: '
        f'pip install --no-index --find-links FOLDER "cbedge[{extra}]"'
    )


class CbedgeError(Exception):
    """Base class of every expected failure. ``exit_code`` is the exit code of the command line."""

    exit_code = 1


class RadiographError(CbedgeError):
    """The given file or array cannot be used as a radiograph."""

    exit_code = 3


class ContextError(CbedgeError):
    """The indication, comparison, view or template cannot be used."""

    exit_code = 4


class BundleError(CbedgeError):
    """A model bundle is missing, incomplete, altered, or of an unknown format or variant."""

    exit_code = 5


class DeviceError(CbedgeError):
    """ONNX Runtime is not installed correctly, or the requested device is not available."""

    exit_code = 6


class OutputError(CbedgeError):
    """A result cannot be written to the requested place."""

    exit_code = 7


class DraftError(CbedgeError):
    """The finished draft fails its last check: it is not a complete report and is not returned."""

    exit_code = 8
