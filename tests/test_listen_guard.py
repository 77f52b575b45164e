import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import free_port, wait_for
from dicom_node import another, names, send
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import ComputedRadiographyImageStorage, Verification

from cbedge.services import dicom_guard as listen_guard


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def pdv(control: int, data: bytes) -> bytes:
    """A P-DATA-TF PDU of one value: control 0 and 1 begin or go on with data and command, 2 and 3 end them."""
    return pdu(4, struct.pack(">LBB", len(data) + 2, 1, control) + data)


def request(calling: str = "MODALITY", called: str = "CBEDGE", contexts: int = 1, most: int = 16384) -> bytes:
    """An A-ASSOCIATE-RQ for storage of CR."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    syntaxes = item(0x30, ComputedRadiographyImageStorage.encode()) + item(0x40, ExplicitVRLittleEndian.encode())
    offered = b"".join(item(0x20, bytes([2 * n + 1, 0, 0, 0]) + syntaxes) for n in range(contexts))
    titles = f"{called:16}{calling:16}".encode()
    user = item(0x50, item(0x51, struct.pack(">L", most)) + item(0x52, b"1.2.3"))
    return pdu(1, struct.pack(">HH", 1, 0) + titles + bytes(32) + item(0x10, b"1.2.840.10008.3.1.1.1") + offered + user)


def command(kind: str = ComputedRadiographyImageStorage, uid: str = "1.2.3") -> bytes:
    """A C-STORE-RQ."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    def text(value: str) -> bytes:
        return value.encode() + b"\0" * (len(value) % 2)

    words = {0x100: 1, 0x110: 1, 0x700: 0, 0x800: 1}
    parts = {2: text(kind), **{n: struct.pack("<H", word) for n, word in words.items()}, 0x1000: text(uid)}
    body = b"".join(element(number, value) for number, value in parts.items())
    return element(0, struct.pack("<L", len(body))) + body


def answer(connection: socket.socket, seconds: float = 20) -> bytes:
    """The next PDU, or nothing where the connection ends."""
    connection.settimeout(seconds)
    received = b""
    with suppress(ConnectionError):
        while len(received) < 6 or len(received) < 6 + struct.unpack(">L", received[2:6])[0]:
            part = connection.recv(1)
            if not part:
                return b""
            received += part
    return received


def associate(port: int, **options: object) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(request(**options))
    assert answer(connection)[:1] == b"\2"
    return connection


def status_in(message: bytes) -> int:
    place = message.index(struct.pack("<HHL", 0, 0x900, 2)) + 8
    return struct.unpack("<H", message[place : place + 2])[0]


@pytest.mark.parametrize("control", [0, 1])  # of data, and of a command that does not end
def test_a_sender_of_too_many_bytes_is_cut_off_while_it_sends(receiver: Callable, film: Path, control: int):
    listener = receiver(max_object_bytes=2_000_000)
    port = listener.settings.port
    with associate(port) as connection:
        sent = 0
        connection.sendall(pdv(3, command()) if control == 0 else b"")
        with suppress(ConnectionError):
            while not select.select([connection], [], [], 0)[0] and sent < 200_000_000:
                connection.sendall(pdv(control, bytes(16_000)))
                sent += 16_000
        assert sent < 30_000_000  # what is under way in the system's buffers included
        assert answer(connection)[:1] in (b"\7", b"")
    wait_for(lambda: listener._reception.together == 0)
    assert names(listener.spool.incoming) == set()
    with associate(port) as connection:  # what is not too long is taken, again and again
        for uid in ("1.2.4", "1.2.5", "1.2.6"):
            connection.sendall(pdv(3, command(uid=uid)))
            for _ in range(120):
                connection.sendall(pdv(0, bytes(16_000)))
            connection.sendall(pdv(2, b"end"))
            assert status_in(answer(connection)) == 0
    assert listener._reception.together == 0


def test_all_senders_together_have_a_limit_too(receiver: Callable):
    listener = receiver(max_received_bytes=2_000_000)
    connections = [associate(listener.settings.port) for _ in range(3)]
    for number, connection in enumerate(connections):
        connection.sendall(pdv(3, command(uid=f"1.2.{number}")))
        with suppress(ConnectionError):  # the third one is cut off while it sends
            for _ in range(50):
                connection.sendall(pdv(0, bytes(16_000)))
        wait_for(lambda number=number: listener._reception.together == 800_000 * min(number + 1, 2))
    assert answer(connections[2])[:1] in (b"\7", b"")
    for connection in connections[:2]:
        connection.sendall(pdv(2, b"end"))
        assert status_in(answer(connection)) == 0
        connection.close()
    connections[2].close()
    wait_for(lambda: listener._reception.together == 0)


def test_a_sender_that_does_not_wait_for_answers_is_cut_off(receiver: Callable, monkeypatch: pytest.MonkeyPatch):
    listener = receiver()
    taken = threading.Event()
    monkeypatch.setattr(listener.spool, "put", lambda *_: taken.wait(20))
    with associate(listener.settings.port) as connection:
        for _ in range(listen_guard.MAX_QUEUED_MESSAGES + 10):
            with suppress(ConnectionError):
                connection.sendall(pdv(3, command()) + pdv(2, b"whole"))
        assert answer(connection)[:1] in (b"\7", b"")
        taken.set()


def test_an_object_of_another_class_than_was_agreed_on_is_refused(receiver: Callable):
    listener = receiver()
    with associate(listener.settings.port) as connection:
        for kind, status in (("1.2.840.10008.5.1.4.1.1.2", 0xA900), (ComputedRadiographyImageStorage, 0)):
            connection.sendall(pdv(3, command(kind)) + pdv(2, b"whole"))
            assert status_in(answer(connection)) == status


@pytest.mark.slow
def test_a_connection_with_half_a_pdu_or_one_that_is_too_long_is_closed(
    receiver: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listen_guard, "PDU_S", 1.0)
    port = receiver().settings.port
    threads = threading.active_count()
    begun = [b"\1", b"\1\0\0\0\0\x80abc", pdu(1, b"x")[:-1], struct.pack(">BxL", 1, 2**31), pdv(0, bytes(99))[:-1]]
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in begun]
    connections += [associate(port) for _ in begun]
    for connection, part in zip(connections, 2 * begun, strict=True):
        connection.sendall(part)
    for connection in connections:
        assert answer(connection, 5)[:1] in (b"", b"\7")
        connection.close()
    slow = associate(port)
    with pytest.raises(ConnectionError):
        for _ in range(50):  # a byte at a time is too slow, too
            slow.sendall(b"\4")
            time.sleep(0.1)
    wait_for(lambda: threading.active_count() <= threads)


def test_what_is_no_message_ends_its_connection_alone_and_is_one_line_in_the_log(
    listen: Callable, film: Path, tmp_path: Path
):
    port, _ = listen(free_port())
    unknown = struct.pack("<HHLL", 0, 0, 4, 10) + struct.pack("<HHLH", 0, 0x100, 2, 0x7777)
    for message in (
        pdu(4, struct.pack(">L", 1) + b"\1"),
        pdv(3, b"junk"),
        pdv(3, unknown),
        pdu(9, b"x"),
        pdv(2, b"x"),
        pdu(4, struct.pack(">L", 5000) + b"\1\3abc"),
        request(),
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with associate(port) as connection:
            connection.sendall(message)
            assert answer(connection)[:1] in (b"\7", b"")
    for asked in (
        request(called="OTHER"),
        request(calling="STRANGER"),
        request()[:200].ljust(300, b"\xff"),
        request(contexts=0),
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(asked)
            assert answer(connection)[:1] in (b"\3", b"\7", b"", b"\2")
    with associate(port, contexts=128, most=0) as connection:
        connection.sendall(pdv(3, command()) + pdv(0, b"begun"))  # and then it hangs up
    assert send(port, another(film)) == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and all(line.startswith("{") for line in log.splitlines())


def test_titles_may_be_padded_and_unknown_ones_are_logged(listen: Callable, tmp_path: Path):
    port, _ = listen(free_port())
    for title in ("MODALITY", "MODALITY\0\0\0\0\0\0\0\0", "MODALITY \0", "  MODALITY"):
        associate(port, calling=title).close()
    associate(port, called="CBEDGE\0\0\0\0").close()
    with socket.create_connection(("127.0.0.1", port)) as connection:  # byte by byte
        for number in range(len(message := request(calling="MODALITY\0"))):
            connection.sendall(message[number : number + 1])
        assert answer(connection)[:1] == b"\2"
    for titles in ({"calling": "STRANGER"}, {"calling": 'A"B'}, {"called": "OTHER"}):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request(**titles))
            assert answer(connection)[:1] == b"\3"
    wait_for(lambda: (tmp_path / "log").read_text().count("was rejected") == 3)
    told = [json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines() if "reject" in line]
    assert told == [
        "an association of 'STRANGER' was rejected: its AE title is not among those of --known",
        "an association of 'A\"B' was rejected: its AE title is not among those of --known",
        "an association of 'MODALITY' was rejected: it calls 'OTHER', but this node is 'CBEDGE'",
    ]


def test_connections_that_say_nothing_keep_no_sender_out(listen: Callable, film: Path, tmp_path: Path):
    port, _ = listen(free_port())
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
    node = AE("MODALITY")
    node.add_requested_context(Verification)
    held = [node.associate("127.0.0.1", port, ae_title="CBEDGE") for _ in range(10)]
    assert all(association.is_established for association in held)
    assert send(port, another(film)) == 0
    for connection in silent:
        connection.close()
    for association in held:
        association.abort()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "rror" not in log
