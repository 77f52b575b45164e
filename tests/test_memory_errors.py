import errno
import subprocess
import sys

import pytest
from conftest import EXAMPLES, ROOT, needs_default_model

from cbedge import DeviceError, RadiographError
from cbedge.errors import memory_errors

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)) * 2**20,) * 2)
from cbedge.cli.main import main
main()
"""


def caused(error: Exception) -> Exception:
    later = RadiographError("the radiograph cannot be read")
    later.__context__ = error
    return later


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc"),
        RuntimeError("[ONNXRuntimeError] : 1 : bad allocation"),
        RuntimeError("CUDA out of memory"),
        ImportError("x.so: failed to map segment from shared object"),
        caused(MemoryError()),
    ],
)
def test_every_sign_of_an_exhausted_memory_is_one_message(error: Exception):
    with pytest.raises(DeviceError, match="not enough memory"), memory_errors():
        raise error


@pytest.mark.parametrize(
    "error", [RadiographError("no such file: bad_alloc.png"), OSError(errno.ENOSPC, "x"), KeyError()]
)
def test_other_errors_stay_as_they_are(error: Exception):
    with pytest.raises(type(error)) as raised, memory_errors():
        raise error
    assert raised.value is error


@needs_default_model
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.parametrize("megabytes", [150, 400, 700, 900, 1100])
def test_a_command_with_too_little_memory_says_so_in_one_line(megabytes: int):
    command = [sys.executable, "-c", LIMITED, megabytes, "generate", EXAMPLES / "chest_pa.png", "--device", "cpu"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    told = done.stderr.splitlines()
    if done.returncode == 0:
        return
    assert len(told) == 1, done.stderr
    ended_by_library = told[0].startswith("OpenBLAS error: Memory allocation")  # it ends the process itself
    assert ended_by_library or (done.returncode == 6 and told[0].startswith("cbedge: not enough memory"))
