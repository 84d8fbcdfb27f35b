"""The store of epochs: what it refuses, and what it keeps."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control.epoch_store import STORE_FILE, Decision, EpochStore
from cluster.control.head import Head, Trial
from cluster.control.state_lock import StateLock
from moesaic.epoch import Epoch, ExpertAddress
from moesaic.errors import Aborted, FailedPrecondition, NotFound


def epoch(salt: int) -> Epoch:
    return Epoch.of("tiny", {ExpertAddress(0, 0): bytes([salt]) * 32}, base=b"b")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EpochStore]:
    store = EpochStore(tmp_path, model="tiny", base=b"b", clock=lambda: 7.0)
    yield store
    store.close()


def first(store: EpochStore) -> Head:
    head = Head(epoch(1).id)
    store.commit(None, head, Decision("first", epoch(1).id), epoch(1))
    return head


def test_what_was_committed_is_there_after_opening_it_again(store: EpochStore, tmp_path: Path) -> None:
    head = first(store)
    trial = head.begin_trial(Trial(epoch(2).id, 0.1, 0.05))
    store.commit(head, trial, Decision("canary", epoch(2).id, epoch(1).id, "legal", "ann", "why"), epoch(2))
    store.close()
    again = EpochStore(tmp_path, model="tiny", base=b"b")
    assert again.head == trial
    assert (again.epoch(epoch(2).id), again.first()) == (epoch(2), epoch(1))
    newest = again.history(1)
    assert newest == [Decision("canary", epoch(2).id, epoch(1).id, "legal", "ann", "why", 7.0)]
    again.close()


def test_the_slower_of_two_commits_is_told_which_epoch_is_current(store: EpochStore) -> None:
    head = first(store)
    store.commit(head, head.move_to(epoch(2).id), Decision("swap", epoch(2).id), epoch(2))
    with pytest.raises(Aborted, match=epoch(2).id):
        store.commit(head, head.move_to(epoch(3).id), Decision("swap", epoch(3).id), epoch(3))
    with pytest.raises(NotFound):
        store.epoch(epoch(3).id)
    assert [one.what for one in store.history()] == ["swap", "first"]


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        ("other", b"b", "state: was made for the model 'tiny', and this is 'other': name another folder"),
        ("tiny", b"c", "state: was made for other weights of 'tiny': name another folder"),
    ],
)
def test_the_store_of_another_model_is_refused(
    store: EpochStore, tmp_path: Path, model: str, base: bytes, message: str
) -> None:
    store.close()
    with pytest.raises(FailedPrecondition) as refused:
        EpochStore(tmp_path, model=model, base=base)
    assert (refused.value.message, refused.value.field) == (message, "state")


def test_a_store_of_another_schema_is_refused(store: EpochStore, tmp_path: Path) -> None:
    store.close()
    with sqlite3.connect(tmp_path / STORE_FILE) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(FailedPrecondition, match="another version of Moesaic"):
        EpochStore(tmp_path, model="tiny", base=b"b")


def test_an_epoch_that_was_tampered_with_is_refused(store: EpochStore, tmp_path: Path) -> None:
    first(store)
    store.close()
    with sqlite3.connect(tmp_path / STORE_FILE) as db:
        content = epoch(2).to_proto().SerializeToString()
        db.execute("UPDATE epochs SET content = ? WHERE id = ?", (content, epoch(1).id))
    db.close()
    with pytest.raises(FailedPrecondition, match="is damaged"):
        EpochStore(tmp_path, model="tiny", base=b"b")


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / STORE_FILE).write_bytes(b"x" * 5000)
    with pytest.raises(FailedPrecondition, match="state: cannot be read"):
        EpochStore(tmp_path, model="tiny", base=b"b")


def test_two_controllers_cannot_use_one_folder(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    with pytest.raises(FailedPrecondition, match="state: another controller uses this folder"):
        StateLock(tmp_path)
    lock.close()
    StateLock(tmp_path).close()
