"""HTTP/2 connections of the h2 library, with our bounds.

Three private parts are replaced, because h2 offers no option for what they do: the state machine rejects
frames that follow GOAWAY, the frame buffer keeps up to 64 frames of one header list before it checks their
size, and hyperframe formats every received frame for a log that is off. So pyproject.toml pins both libraries
exactly, and tests/unit/moesaic/transports/test_http2.py checks that each part still exists and still behaves
like that without its replacement: an upgrade fails there first.
"""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.events import Event
from h2.exceptions import DenialOfServiceError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame, PushPromiseFrame

# The streams that one caller may have open on one connection.
MAX_STREAMS = 16

# The flow-control window of a stream and of the connection. It is large because it protects nothing: no
# message waits here, and an owner that processes messages more slowly than they arrive stops reading the
# socket instead.
WINDOW_BYTES = 64 << 20
# The largest frame. Joining larger ones costs h2 more than having fewer of them saves.
_FRAME_BYTES = 512 << 10
# The largest header list, decoded, and so also the largest encoded one, which is never longer.
_HEADER_LIST_BYTES = 16 << 10


def open_connection(client: bool) -> H2Connection:
    """A connection whose preface is ready to send."""
    settings = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
        SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES,
        SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
    }
    # Our own headers need no validation; those of the other end are validated.
    config = H2Configuration(
        client_side=client, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = H2Connection(config)
    connection.state_machine = _OpenAfterGoaway()
    connection.incoming_buffer = _Frames(server=not client)
    connection.local_settings = Settings(client, settings)
    connection.max_inbound_frame_size = _FRAME_BYTES
    connection.decoder.max_header_list_size = _HEADER_LIST_BYTES
    connection.initiate_connection()
    # The connection's window is not a setting; it starts at the default of HTTP/2.
    connection.increment_flow_control_window(WINDOW_BYTES - connection.inbound_flow_control_window)
    return connection


class _OpenAfterGoaway(H2ConnectionStateMachine):
    """Stays open after a GOAWAY, so that frames that follow it in the same bytes are not an error of the
    other end."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)


class _Frames(FrameBuffer):
    """Received frames, without their descriptions and with bounded header lists."""

    def __next__(self) -> Frame:
        frame = super().__next__()
        # h2 formats every frame, its data in hexadecimal, for a log that is off: half the cost of a message.
        frame._body_repr = str  # type: ignore[method-assign]
        return frame

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        # h2 would keep 64 frames of one header list before it decodes any, and spend seconds on decoding
        # bytes that add no header.
        if isinstance(f, HeadersFrame | ContinuationFrame | PushPromiseFrame):
            num_bytes = len(f.data) + sum(len(part.data) for part in self._headers_buffer)
            if num_bytes > _HEADER_LIST_BYTES:
                raise DenialOfServiceError(f"a header block of more than {_HEADER_LIST_BYTES} bytes")
        return super()._update_header_buffer(f)
