"""What a start makes is left out of every later collection of garbage."""

from __future__ import annotations

import gc
import weakref

import pytest

from moesaic.garbage import freeze_lasting_objects, lasting_imports


class _Node:
    """Refers to itself, so that only a collection can end it."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_during_imports() -> None:
    before = gc.get_freeze_count()
    with lasting_imports():
        assert not gc.isenabled()
        kept = _Node()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert all(each is not kept for each in gc.get_objects())


def test_collections_go_on_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), lasting_imports():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_garbage_of_the_start_is_not_kept() -> None:
    node = weakref.ref(_Node())
    freeze_lasting_objects()
    assert node() is None


def test_what_is_made_after_the_start_is_collected() -> None:
    freeze_lasting_objects()
    node = weakref.ref(_Node())
    gc.collect()
    assert node() is None
