"""Errors that cbedge raises on purpose: each message says what is wrong, with what, and what to do."""


class CbedgeError(Exception):
    """Base of every expected failure. ``exit_code`` is what the command line returns for it."""

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
    """ONNX Runtime is not installed as needed, or the device asked for is not to be had."""

    exit_code = 6


class OutputError(CbedgeError):
    """A result cannot be written where it was asked for."""

    exit_code = 7


class DraftError(CbedgeError):
    """The finished draft fails its last check: it is not a report, and is not handed out as one."""

    exit_code = 8
