"""The micro-batch that passes the modules of transformers, for tests of single modules."""

from __future__ import annotations

from typing import Any, cast

import torch

from router.attention.packed_batch import PackedBatch
from router.decoders.decoder import MicroBatch
from router.decoders.hf.moe_block import CurrentStep
from router.dispatch.dispatcher import DispatchStep


def step_of(experts: Any = None) -> CurrentStep:
    """A step whose rows see the gates of the folder, and whose layers call `experts`."""
    step = CurrentStep()
    batch = cast(PackedBatch, None)
    step.micro_batch = MicroBatch(batch, torch.arange(0), cast(DispatchStep, experts))
    return step
