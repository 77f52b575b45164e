"""Addresses of services: sockets to listen on, and titles of DICOM application entities."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cbedge.errors import OptionError
from cbedge.images.radiograph import printable


@contextmanager
def address_errors(host: str, port: int) -> Iterator[None]:
    """Convert the errors of a socket that cannot listen to one message.

    Raises:
        OptionError: the address is invalid, in use, or not of this machine.
    """
    try:
        yield
    except (OSError, ValueError, OverflowError) as error:  # ValueError: such as a host name with an empty label
        reason = error.strerror if isinstance(error, OSError) else None
        raise OptionError(
            f"cannot listen on {printable(host)}:{port}: {reason or 'invalid host name'}; give another --host or --port"
        ) from None


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; of several addresses of a name, the first IPv4 one.

    Raises:
        OptionError: it cannot listen there.
    """
    with address_errors(host, port):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        return socket.create_server(address, family=family)


def check_ae_title(title: str, what: str) -> None:
    """Check the application entity title that the option ``what`` gives; spaces around it are not significant.

    Raises:
        OptionError: it is empty, has more than 16 characters, or characters that DICOM does not allow.
    """
    if not (0 < len(title.strip()) <= 16 and title.isascii() and title.isprintable() and "\\" not in title):
        raise OptionError(
            f"the AE title of {what}, '{printable(title)}', is invalid: give 1 to 16 ASCII characters, without "
            "backslashes and control characters"
        )
