"""Shared memory comes first, then the direct stream up to its size, then grpcio."""

from __future__ import annotations

import pytest

from router.workers.transports.base import DIRECT, GRPC, SHARED_MEMORY, TransportKind
from router.workers.transports.order import choose


@pytest.mark.parametrize(
    ("opened", "small", "large"),
    [
        ({SHARED_MEMORY, DIRECT}, SHARED_MEMORY, SHARED_MEMORY),
        ({SHARED_MEMORY}, SHARED_MEMORY, SHARED_MEMORY),
        ({DIRECT}, DIRECT, GRPC),
        (set(), GRPC, GRPC),
    ],
)
def test_the_first_open_transport_that_can_carry_a_call_is_taken(
    opened: set[TransportKind], small: TransportKind, large: TransportKind
) -> None:
    assert choose(opened, fits_direct=True) == small
    assert choose(opened, fits_direct=False) == large
