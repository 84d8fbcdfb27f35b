"""Which decoder runs a checkpoint: our own where it knows the family, else the modules of transformers."""

from __future__ import annotations

from moesaic.checkpoint import Checkpoint
from moesaic.errors import InvalidArgument, Unsupported
from moesaic.families import MoeModel
from moesaic.settings import Decoder
from router.batch import Layout
from router.decoder_layout import DecoderLayout, describe_decoder
from router.lean_decoder import LeanDecoder
from router.model import RouterModel
from router.phases import PhaseClock


def load_model(
    checkpoint: Checkpoint,
    shape: MoeModel,
    layout: Layout,
    *,
    decoder: Decoder,
    num_positions: int,
    clock: PhaseClock,
) -> RouterModel:
    """Reads all but the expert weights, for sequences of at most `num_positions` tokens.

    Raises CheckpointError; Unsupported where the lean decoder is wanted and does not know the model.
    """
    described = _describe(checkpoint, shape, layout, decoder)
    if described is not None:
        return LeanDecoder(checkpoint, shape, described, layout, num_positions=num_positions, clock=clock)
    # Heavy: the modelling code of transformers is 90 MiB that a lean router does without.
    from router.stock_decoder import StockDecoder

    return StockDecoder(checkpoint, shape, layout, clock=clock)


def _describe(
    checkpoint: Checkpoint, shape: MoeModel, layout: Layout, decoder: Decoder
) -> DecoderLayout | None:
    """None: stock."""
    if decoder == "stock":
        if layout.invariant:
            raise InvalidArgument(
                "engine.batch_invariant: the stock decoder is not; use lean", field="engine.batch_invariant"
            )
        return None
    try:
        return describe_decoder(checkpoint, shape)
    except Unsupported:
        if decoder == "lean" or layout.invariant:
            raise
        return None
