"""Blocks of the KV cache: counted, shared, never lost."""

from __future__ import annotations

import pytest

from router.scheduling.block_pool import BlockPool, OutOfBlocks


def test_the_pool_refuses_without_taking_anything() -> None:
    pool = BlockPool(2, 4)
    table: list[int] = []
    with pytest.raises(OutOfBlocks):
        pool.extend(table, 9)
    assert table == [] and pool.num_free == 2


def test_the_integrity_check_sees_a_block_that_two_sequences_own() -> None:
    pool = BlockPool(2, 4)
    table: list[int] = []
    pool.extend(table, 4)
    with pytest.raises(AssertionError, match="do not add up"):
        pool.check_integrity([table, table])


def test_the_integrity_check_sees_a_lost_user() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.extend(table, 4)
    pool.set_hash(table[0], b"name")
    shared = pool.share(b"name")
    assert shared == table[0]
    pool.check_integrity([table, [shared]])
    with pytest.raises(AssertionError, match="do not add up"):
        pool.check_integrity([table])
