"""The private parts of h2 and hyperframe that moesaic/transports/http2.py replaces: they exist, and they are
needed.

A failure here after an upgrade of either library means that the replacement has to be read again, and perhaps
can go.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection, H2ConnectionStateMachine
from h2.exceptions import DenialOfServiceError, ProtocolError
from h2.frame_buffer import FrameBuffer
from hyperframe.frame import ContinuationFrame, DataFrame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame

from moesaic.transports import http2

ROOT = Path(__file__).parents[4]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEADER_LIST_BYTES = 16 << 10


def plain_server() -> H2Connection:
    connection = H2Connection(H2Configuration(client_side=False))
    connection.initiate_connection()
    connection.decoder.max_header_list_size = HEADER_LIST_BYTES
    connection.receive_data(PREFACE)
    return connection


def our_server() -> H2Connection:
    connection = http2.open_connection(client=False)
    connection.receive_data(PREFACE)
    return connection


@pytest.mark.parametrize("library", ["h2", "hyperframe"])
def test_a_library_whose_private_parts_are_replaced_is_pinned_to_the_installed_version(library: str) -> None:
    pin = f"{library}=={version(library)}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pin in project["dependencies"], "http2.py replaces private parts: pin exactly"
    assert pin in (ROOT / "constraints.txt").read_text().splitlines()


def test_a_connection_has_the_parts_that_are_replaced() -> None:
    connection = H2Connection(H2Configuration(client_side=False))
    assert type(connection.state_machine) is H2ConnectionStateMachine
    assert type(connection.incoming_buffer) is FrameBuffer
    assert connection.incoming_buffer._headers_buffer == []
    assert callable(connection.incoming_buffer._update_header_buffer)
    assert hasattr(connection, "local_settings") and hasattr(connection, "max_inbound_frame_size")
    assert hasattr(connection.decoder, "max_header_list_size")


def test_h2_alone_rejects_a_frame_that_follows_goaway() -> None:
    raw = GoAwayFrame(0).serialize() + PingFrame(0, opaque_data=bytes(8)).serialize()
    with pytest.raises(ProtocolError):
        plain_server().receive_data(raw)
    assert our_server().receive_data(raw)


def test_h2_alone_keeps_a_header_list_without_end_far_beyond_its_bound() -> None:
    frames = [HeadersFrame(1, data=b"\x20" * HEADER_LIST_BYTES)]
    frames += [ContinuationFrame(1, data=b"\x20" * HEADER_LIST_BYTES)] * 20
    raw = b"".join(frame.serialize() for frame in frames)
    plain = plain_server()
    assert plain.receive_data(raw) == []
    assert len(plain.incoming_buffer._headers_buffer) == 21
    with pytest.raises(DenialOfServiceError):
        our_server().receive_data(raw)


def test_h2_alone_describes_every_frame_for_a_log_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[DataFrame] = []

    def describe(frame: DataFrame) -> str:
        described.append(frame)
        return ""

    monkeypatch.setattr(DataFrame, "_body_repr", describe)
    raw = DataFrame(1, data=b"rows").serialize()
    for server, num_descriptions in ((plain_server(), 1), (our_server(), 0)):
        described.clear()
        with pytest.raises(ProtocolError):  # of a stream that was never opened
            server.receive_data(raw)
        assert len(described) == num_descriptions
