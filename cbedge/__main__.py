"""The command line's entry point, small so that Ctrl-C has its message while the rest is imported."""

import os
import signal
import threading
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; see :func:`cbedge.cli.main.main`."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    from cbedge.cli.main import main as run

    run()


def _interrupt(number: int, frame: object) -> NoReturn:
    os.write(2, b"cbedge: interrupted\n")
    os._exit(130)  # an exception may be caught by what is imported


if __name__ == "__main__":
    main()
