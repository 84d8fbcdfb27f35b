"""An encoder-decoder whose sequences see other gates: on both sides, beside sequences that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.encoder_decoders import write_nllb, write_switch
from support.view_rig import view_rig

from moesaic.epoch import ExpertAddress
from moesaic.errors import FailedPrecondition

PROMPTS = ([5, 6, 7, 8, 9, 11], [12, 13, 14], [21, 3, 8, 40, 41])


@pytest.mark.parametrize("write", [write_switch, write_nllb])
def test_each_sequence_of_a_batch_gets_what_its_own_policy_leaves(tmp_path: Path, write: object) -> None:
    write(tmp_path, 1)  # type: ignore[operator]
    with view_rig(tmp_path) as rig:
        gated = [layer for layer, shape in rig.loaded.gates.items() if shape.num_slots > 1]
        denied = {ExpertAddress(layer, slot) for layer in gated for slot in (0, 2)}
        plain = rig.view(rig.base)
        restricted = rig.view(rig.base, deny=[f"{layer}:{slot}" for layer, slot in sorted(denied)])
        alone = [
            rig.run([(prompt, view)], 6, scored=False)[0]
            for prompt in PROMPTS
            for view in (plain, restricted)
        ]
        num_calls = len(rig.requests())
        requests = [(prompt, view) for prompt in PROMPTS for view in (plain, restricted)]
        together = rig.run(requests, 6, scored=False)
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        assert any(answers[0] != answers[1] for answers in zip(alone[::2], alone[1::2], strict=True))
        rig.run([(prompt, restricted) for prompt in PROMPTS], 6, scored=False)
        computed = {
            ExpertAddress(request.layer, group.slot)
            for request in rig.requests()[num_calls:]
            for group in request.experts
        }
        assert computed & denied, "the plain sequences of the mixed batch use them"
        last = rig.requests()
        before = len(last)
        rig.run([(prompt, restricted) for prompt in PROMPTS], 6, scored=False)
        used = {
            ExpertAddress(request.layer, group.slot)
            for request in rig.requests()[before:]
            for group in request.experts
        }
        assert used and not used & denied


def test_where_slots_can_be_full_a_policy_is_refused(tmp_path: Path) -> None:
    write_switch(tmp_path, 1)
    with view_rig(tmp_path, capacity="model") as rig, pytest.raises(FailedPrecondition, match="capacity"):
        rig.view(rig.base, deny=["1:0"])
