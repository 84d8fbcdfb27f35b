"""HTTP/2 as the library speaks it (h2): how much may come at once, and at what cost."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.events import Event
from h2.exceptions import DenialOfServiceError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame, PushPromiseFrame

# Streams that one caller may have open on one connection.
MAX_STREAMS = 16

# What may be under way to us, on a stream and on all of them, before we say that there is room again. Nothing waits in
# here, so it guards nothing and is large: whoever takes messages more slowly than they come stops reading the socket.
WINDOW_BYTES = 64 << 20
# Of one frame: larger ones cost h2 more to join than their number saves.
_FRAME_BYTES = 512 << 10
# Of one list of headers, read and, which is never more, as it comes.
_HEADER_LIST_BYTES = 16 << 10


def open_connection(client: bool) -> H2Connection:
    """A connection whose preface is ready to be sent."""
    settings = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
        SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES,
        SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
    }
    # What we say in headers is our own; what others say is checked.
    config = H2Configuration(
        client_side=client, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = H2Connection(config)
    connection.state_machine = _OpenAfterGoodbye()
    connection.incoming_buffer = _Frames(server=not client)
    connection.local_settings = Settings(client, settings)
    connection.max_inbound_frame_size = _FRAME_BYTES
    connection.decoder.max_header_list_size = _HEADER_LIST_BYTES
    connection.initiate_connection()
    # The window of the connection is no setting; it begins at HTTP/2's default.
    connection.increment_flow_control_window(WINDOW_BYTES - connection.inbound_flow_control_window)
    return connection


class _OpenAfterGoodbye(H2ConnectionStateMachine):
    """Hears GOAWAY as a word among others: frames behind it in the same piece of bytes are no error of the other end."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)


class _Frames(FrameBuffer):
    """The frames that come, neither described nor joined without bound."""

    def __next__(self) -> Frame:
        frame = super().__next__()
        # h2 would describe it, data in hexadecimal, to a log that is none: half of what a message costs.
        frame._body_repr = str  # type: ignore[method-assign]
        return frame

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        # h2 would keep 64 frames of one list before it reads any, and read seconds long what fills no list.
        if isinstance(f, HeadersFrame | ContinuationFrame | PushPromiseFrame):
            num_bytes = len(f.data) + sum(len(part.data) for part in self._headers_buffer)
            if num_bytes > _HEADER_LIST_BYTES:
                raise DenialOfServiceError(f"a header block of more than {_HEADER_LIST_BYTES} bytes")
        return super()._update_header_buffer(f)
