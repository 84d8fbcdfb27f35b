"""A layer in flight: what is missing, and whom the next wave leaves out."""

from __future__ import annotations

import torch
from support.fake_links import FakeLink, digest

from moesaic.errors import Unavailable
from moesaic.routing_table import Replica
from router.dispatch.combine import RowCombiner
from router.dispatch.host_staging import HostStaging
from router.dispatch.layer_call import LayerCall
from router.dispatch.layer_request import LayerRequest
from router.dispatch.row_grouping import RowsBySlot
from router.dispatch.wave import WorkerCall

HIDDEN = torch.ones(2, 3)
GONE, UNHELD = Unavailable("gone"), Unavailable("nobody holds it")


def layer_of(slots: list[list[int]]) -> LayerCall:
    groups = RowsBySlot.of(torch.tensor(slots))
    weights = torch.ones(len(slots), len(slots[0]))
    return LayerCall(
        request=LayerRequest("epoch", 0, HIDDEN, None, None),
        groups=groups,
        versions=[digest(0, slot) for slot in groups.slots],
        combiner=RowCombiner(HostStaging(), groups, weights, HIDDEN.shape[1], HIDDEN.dtype),
        dtype=HIDDEN.dtype,
        slots=torch.tensor(slots),
        tokens=None,
    )


def ask(layer: LayerCall, worker: str, groups: list[int]) -> WorkerCall:
    """Sends some groups to a fake worker."""
    rows = layer.groups.worker_rows(groups)
    versions = [digest(0, slot) for slot in rows.slots]
    link = FakeLink(Replica(worker, f"{worker}:1", f"{worker}-1", {}))
    request, hidden = layer.request.to_worker(rows, versions, timeout_ms=1)
    return WorkerCall(link, rows, versions, link.send(request, hidden), None, 0.0)  # type: ignore[arg-type]


def test_the_first_wave_is_for_every_group_and_leaves_out_the_silent() -> None:
    layer = layer_of([[5, 2], [2, 7]])
    wave = layer.begin_wave(silent={"mute"}, deadline_s=1.0)
    assert wave.excluded == {group: {"mute"} for group in range(3)}
    assert (wave.deadline_s, wave.calls) == (1.0, [])


def test_the_next_wave_is_for_what_is_missing_and_leaves_out_who_failed_it() -> None:
    layer = layer_of([[5, 2], [2, 7]])
    layer.begin_wave(silent=set(), deadline_s=1.0)
    good, bad = ask(layer, "good", [0]), ask(layer, "bad", [1])
    layer.accept(good, good.link.receive(good.pending, 0.0))
    layer.fail(bad, GONE)
    layer.fail_unheld(2, UNHELD)
    assert layer.begin_wave(silent={"mute"}, deadline_s=2.0).excluded == {1: {"bad-1", "mute"}, 2: {"mute"}}
    layer.fail(ask(layer, "worse", [1]), GONE)
    assert layer.begin_wave(silent=set(), deadline_s=3.0).excluded == {1: {"bad-1", "worse-1"}, 2: set()}


def test_what_a_later_wave_answers_is_missing_no_more() -> None:
    layer = layer_of([[5, 2], [2, 7]])
    layer.fail(ask(layer, "bad", [0, 1, 2]), GONE)
    assert layer.failed_tokens() == {0: GONE, 1: GONE}
    good = ask(layer, "good", [0, 1])
    layer.accept(good, good.link.receive(good.pending, 0.0))
    assert layer.failed_tokens() == {1: GONE}
    assert layer.begin_wave(silent=set(), deadline_s=1.0).excluded == {2: {"bad-1"}}


def test_the_error_of_a_replica_that_failed_outlives_that_no_other_is_left() -> None:
    layer = layer_of([[5, 2], [2, 7]])
    layer.fail(ask(layer, "bad", [1]), GONE)
    for group in range(3):
        layer.fail_unheld(group, UNHELD)
    assert layer.errors == {0: UNHELD, 1: GONE, 2: UNHELD}
