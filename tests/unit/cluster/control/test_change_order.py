"""Orders as they arrive."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.control.change_order import ChangeOrder, Shares
from moesaic.bundles import BundleExpert, Manifest
from moesaic.epoch import ExpertAddress, GateRow
from moesaic.errors import InvalidArgument
from moesaic.v1 import control_pb2 as pb

DIGEST = b"d" * 32


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "kind"),
        ({"kind": pb.CHANGE_KIND_SWAP, "bundle": b"short"}, "bundle"),
        ({"kind": pb.CHANGE_KIND_REMOVE}, "name"),
        ({"kind": pb.CHANGE_KIND_PROMOTE, "canary": True, "share": 0.5}, "canary"),
        ({"kind": pb.CHANGE_KIND_SWAP, "bundle": DIGEST, "canary": True, "share": 1.5}, "share"),
        ({"kind": pb.CHANGE_KIND_SWAP, "bundle": DIGEST, "canary": True, "share": float("nan")}, "share"),
        ({"kind": pb.CHANGE_KIND_SWAP, "bundle": DIGEST, "canary": True}, "share"),
        (
            {
                "kind": pb.CHANGE_KIND_SWAP,
                "bundle": DIGEST,
                "gate_rows": [GateRow(b"").to_proto(ExpertAddress(0, 0))],
            },
            "gate_rows",
        ),
    ],
)
def test_an_order_that_makes_no_sense_names_its_field(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        ChangeOrder.from_proto(pb.ChangeRequest(**request_))
    assert refused.value.field == field


def test_a_canary_keeps_its_shares() -> None:
    request = pb.ChangeRequest(
        kind=pb.CHANGE_KIND_ADD, bundle=DIGEST, canary=True, share=0.25, shadow_share=0.5, operator="ann"
    )
    order = ChangeOrder.from_proto(request)
    assert (order.word, order.canary, order.operator) == ("add", Shares(0.25, 0.5), "ann")


def test_rows_made_on_the_spot_find_their_experts_by_layer_and_place() -> None:
    experts = tuple(BundleExpert(layer, None, "mlp", {}, "0" * 64, {}) for layer in (0, 1, 1))
    manifest = Manifest("maths", "tiny", "0" * 64, 8, experts, {})
    rows = {(1, 1): GateRow(b"b"), (0, 0): GateRow(b"a")}
    order = ChangeOrder("add", DIGEST, gate_rows=rows)
    assert order.rows_of(manifest) == {0: GateRow(b"a"), 2: GateRow(b"b")}
    with pytest.raises(InvalidArgument, match="no expert 2 in layer 1"):
        ChangeOrder("add", DIGEST, gate_rows={(1, 2): GateRow(b"c")}).rows_of(manifest)
