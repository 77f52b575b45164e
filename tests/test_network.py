"""No command uses a network or writes outside the folders that it is given: traced in a namespace without any."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

INSIDE = """
import os, signal, subprocess, sys, time, socket
from pathlib import Path
port, command = int(sys.argv[1]), sys.argv[2:]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
process = subprocess.Popen(command)
for _ in range(600):
    if not port and process.poll() is not None:
        break
    try:
        if port:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
    except OSError:
        pass
    assert not port or process.poll() is None
    time.sleep(0.1)
if port == 8642:
    import httpx
    film = open("examples/chest_pa.png", "rb")
    answer = httpx.post("http://127.0.0.1:8642/v1/reports", files={"image": film}, timeout=60)
    assert answer.status_code == 200, answer.text
if port == 11112:
    import pydicom
    from pynetdicom import AE
    film = pydicom.dcmread("examples/chest_pa.dcm")
    node = AE("X")
    node.add_requested_context(film.SOPClassUID, film.file_meta.TransferSyntaxUID)
    association = node.associate("127.0.0.1", 11112, ae_title="CBEDGE")
    assert association.send_c_store(film).Status == 0
    association.release()
    drafts = Path(command[command.index("--spool") + 1], "outgoing")
    while not [*drafts.glob("*.dcm")]:
        assert process.poll() is None
        time.sleep(0.1)
if port:  # the traced process, which is the tracer's only child
    os.kill(int(open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()[0]), signal.SIGTERM)
sys.exit(process.wait(60) if not port else process.wait(60) and 0)
"""

needs_namespaces = pytest.mark.skipif(
    shutil.which("strace") is None
    or shutil.which("ip") is None
    or not hasattr(os, "geteuid")
    or os.geteuid() != 0
    or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0,
    reason="needs root, unshare, iproute2 and strace",
)
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize(
    ("port", "arguments"),
    [
        (0, ["generate", "examples/chest_pa.png", "-o", "OUT/draft.json", "--format", "json"]),
        (0, ["batch", "examples", "--out", "OUT/reports.jsonl"]),
        (0, ["doctor"]),
        (0, ["bench", "--repeat", "1", "--warm-up", "0", "-o", "OUT/bench.txt"]),
        (8642, ["serve"]),
        (11112, ["listen", "--known", "X", "--spool", "OUT/spool"]),
    ],
    ids=["generate", "batch", "doctor", "bench", "serve", "listen"],
)
def test_a_command_opens_no_socket_but_loopback_and_no_file_elsewhere(port: int, arguments: list[str], tmp_path: Path):
    trace, out, home, scratch = (tmp_path / name for name in ("trace", "out", "home", "scratch"))
    for folder in (out, home, scratch):
        folder.mkdir()
    words = [word.replace("OUT", str(out)) for word in arguments]
    command = [
        "unshare",
        "-n",
        sys.executable,
        "-c",
        INSIDE,
        str(port),
        "strace",
        "-f",
        "-qq",
        "-o",
        str(trace),
        "-e",
        "trace=socket,connect,bind,sendto,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2",
        sys.executable,
        "-m",
        "cbedge.cli",
        *words,
    ]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    lines = trace.read_text(errors="replace").splitlines()
    assert done.returncode in (0, 3), done.stderr  # a batch of the examples meets files that are no radiographs
    assert len(lines) > 100
    for line in lines:
        for found in ADDRESS.finditer(line):
            assert (found[1] or found[2]).startswith(("127.", "::1")), line
        if "O_CREAT" in line or "mkdir" in line or "rename" in line or "creat(" in line:
            for name in re.findall(r'"([^"]+)"', line):
                allowed = (str(out), str(scratch), "/dev/", "/proc/")
                assert not name.startswith("/") or name.startswith(allowed), line
                assert name.startswith("/") or "AT_FDCWD" not in line or "= -1" in line, line
    assert not list(home.rglob("*"))


def test_the_runtime_is_told_to_send_nothing_before_it_is_imported():
    code = "import os, cbedge; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1" and (EXAMPLES / "chest_pa.png").is_file()
