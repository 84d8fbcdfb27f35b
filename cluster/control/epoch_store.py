"""What the model is, kept on disk: the epochs, which of them are in use, and every decision.

One SQLite file with a write-ahead log that is forced to the disk with every commit. The head moves by compare-and-set
alone, in the transaction that also stores a new epoch and the decision: after a crash all three are there or none.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from cluster.control.head import Head, Trial
from moesaic.epoch import Epoch
from moesaic.errors import Aborted, FailedPrecondition, MoesaicError, NotFound
from moesaic.v1 import control_pb2

STORE_FILE = "moesaic.sqlite"
SCHEMA_VERSION = 1
# The steps of a commit at which tests let it crash.
FAILPOINTS = ("store.begin", "store.epoch", "store.head", "store.history", "store.committed")

_SCHEMA = """
CREATE TABLE made_for (model TEXT NOT NULL, base BLOB NOT NULL);
CREATE TABLE epochs (id TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    current TEXT NOT NULL REFERENCES epochs (id),
    previous TEXT REFERENCES epochs (id),
    canary TEXT REFERENCES epochs (id),
    share REAL,
    shadow_share REAL
);
CREATE TABLE history (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    what TEXT NOT NULL,
    epoch TEXT NOT NULL,
    previous_epoch TEXT NOT NULL,
    bundle TEXT NOT NULL,
    operator TEXT NOT NULL,
    detail TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the history. `what` is first, swap, add, remove, canary, promote, rollback, forget or refused."""

    what: str
    epoch: str = ""
    previous_epoch: str = ""
    bundle: str = ""
    operator: str = ""
    # Why, with the figure that decided.
    detail: str = ""
    # Seconds since 1970.
    time: float = 0.0


def go_on(step: str) -> None:
    """Passes a failpoint."""


class EpochStore:
    """The store of one cluster. One process may have it open; the folder's lock sees to that."""

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        base: bytes,
        failpoints: Callable[[str], None] = go_on,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the store of this model, or makes one. Raises FailedPrecondition with field `state`."""
        self._failpoints = failpoints
        self._clock = clock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / STORE_FILE, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise _refused(f"cannot be opened: {error}") from error
        try:
            self._open(model, base)
        except sqlite3.Error as error:
            self._db.close()
            raise _refused(f"cannot be read: {error}") from error
        except MoesaicError:
            self._db.close()
            raise

    @property
    def head(self) -> Head | None:
        """None before the first epoch."""
        row = self._db.execute("SELECT current, previous, canary, share, shadow_share FROM head").fetchone()
        if row is None:
            return None
        current, previous, canary, share, shadow_share = row
        return Head(current, previous or "", Trial(canary, share, shadow_share) if canary else None)

    def epoch(self, epoch_id: str) -> Epoch:
        """Raises NotFound, or FailedPrecondition when its content is not what the id says."""
        row = self._db.execute("SELECT content FROM epochs WHERE id = ?", (epoch_id,)).fetchone()
        if row is None:
            raise NotFound(f"epoch: {epoch_id[:64]!r} is not known", field="epoch")
        try:
            epoch = Epoch.from_proto(control_pb2.Epoch.FromString(row[0]))
        except (DecodeError, MoesaicError) as error:
            raise _refused(f"epoch {epoch_id} is damaged: {error}") from error
        if epoch.id != epoch_id:
            raise _refused(f"epoch {epoch_id} is damaged: its content is that of {epoch.id}")
        return epoch

    def first(self) -> Epoch | None:
        """The epoch of the model folder: the oldest one."""
        row = self._db.execute("SELECT id FROM epochs ORDER BY rowid LIMIT 1").fetchone()
        return None if row is None else self.epoch(row[0])

    def commit(
        self, expected: Head | None, head: Head, decision: Decision, new_epoch: Epoch | None = None
    ) -> None:
        """Moves the head, stores an epoch that is new, and notes the decision: all of it or nothing.

        Raises Aborted with reason EPOCH_MOVED if the head is not `expected` any more.
        """
        self._failpoints("store.begin")
        with self._transaction():
            if (found := self.head) != expected:
                current = "no epoch" if found is None else f"epoch {found.current}"
                raise Aborted(f"another change was faster: {current} is current now", reason="EPOCH_MOVED")
            if new_epoch is not None:
                content = new_epoch.to_proto().SerializeToString(deterministic=True)
                self._db.execute("INSERT OR IGNORE INTO epochs VALUES (?, ?)", (new_epoch.id, content))
            self._failpoints("store.epoch")
            self._write_head(head)
            self._failpoints("store.head")
            self._write(decision)
            self._failpoints("store.history")
        self._failpoints("store.committed")

    def note(self, decision: Decision) -> None:
        """Keeps a decision that moves no head, such as a refusal."""
        with self._transaction():
            self._write(decision)

    def history(self, limit: int = 100) -> list[Decision]:
        """The newest first."""
        rows = self._db.execute(
            "SELECT what, epoch, previous_epoch, bundle, operator, detail, time FROM history "
            "ORDER BY number DESC LIMIT ?",
            (limit,),
        )
        return [Decision(*row) for row in rows]

    def close(self) -> None:
        self._db.close()

    def _open(self, model: str, base: bytes) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._create(model, base)
        elif version != SCHEMA_VERSION:
            raise _refused(
                f"was written by another version of Moesaic (schema {version}, not {SCHEMA_VERSION})"
            )
        self._check_origin(model, base)
        if (head := self.head) is not None:
            for epoch in filter(None, (*head.in_use, head.previous)):
                self.epoch(epoch)

    def _create(self, model: str, base: bytes) -> None:
        with self._transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            self._db.execute("INSERT INTO made_for VALUES (?, ?)", (model, base))
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_origin(self, model: str, base: bytes) -> None:
        was_model, was_base = self._db.execute("SELECT model, base FROM made_for").fetchone()
        if was_model != model:
            raise _refused(
                f"was made for the model {was_model!r}, and this is {model!r}: name another folder"
            )
        if was_base != base:
            raise _refused(f"was made for other weights of {model!r}: name another folder")

    def _write_head(self, head: Head) -> None:
        canary = head.canary
        trial = (None,) * 3 if canary is None else (canary.epoch, canary.share, canary.shadow_share)
        values = (head.current, head.previous or None, *trial)
        self._db.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?, ?, ?, ?)", values)

    def _write(self, decision: Decision) -> None:
        self._db.execute(
            "INSERT INTO history (time, what, epoch, previous_epoch, bundle, operator, detail) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                decision.time or self._clock(),
                decision.what,
                decision.epoch,
                decision.previous_epoch,
                decision.bundle,
                decision.operator,
                decision.detail,
            ),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise _refused(f"cannot be written: {error}") from error


def _refused(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"state: {problem}", field="state", reason="BAD_STATE")
