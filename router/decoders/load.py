"""Which decoder runs a checkpoint: our own where it knows the family, else the modules of transformers."""

from __future__ import annotations

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import InvalidArgument, Unsupported
from moesaic.families.model import MoeModel
from moesaic.families.stripedhyena import FAMILY
from moesaic.settings import CapacityLimit, Decoder
from router.attention.views import Layout
from router.decoders.decoder import RouterModel
from router.decoders.encoder_decoder.decoder import EncoderDecoder
from router.decoders.lean.decoder import LeanDecoder
from router.decoders.lean.supported import DecoderLayout, describe_decoder
from router.decoders.stripedhyena.decoder import StripedHyena
from router.phase_clock import PhaseClock


def load_model(
    checkpoint: Checkpoint,
    model: MoeModel,
    layout: Layout,
    *,
    decoder: Decoder,
    num_positions: int,
    clock: PhaseClock,
    capacity: CapacityLimit = "off",
) -> RouterModel:
    """Reads all but the expert weights, for sequences of at most `num_positions` tokens.

    Raises CheckpointError; Unsupported where the lean decoder is wanted and does not know the model, or a capacity
    that the family does not have.
    """
    if capacity == "model" and all(experts.capacity is None for experts in model.experts.values()):
        raise Unsupported(
            f"engine.capacity: experts of a {model.family} have none; use off", field="engine.capacity"
        )
    if model.family == FAMILY or model.num_encoder_layers:
        _refuse_variants(model, layout, decoder)
    if model.num_encoder_layers:
        return EncoderDecoder(
            checkpoint,
            model,
            layout,
            num_positions=num_positions,
            clock=clock,
            limits_slots=capacity == "model",
        )
    if model.family == FAMILY:
        return StripedHyena(checkpoint, model, layout, num_positions=num_positions, clock=clock)
    described = _describe(checkpoint, model, layout, decoder)
    if described is not None:
        return LeanDecoder(checkpoint, model, described, layout, num_positions=num_positions, clock=clock)
    # Heavy: the modelling code of transformers is 90 MiB that a lean router does without.
    from router.decoders.hf.decoder import StockDecoder

    return StockDecoder(checkpoint, model, layout, num_positions=num_positions, clock=clock)


def _refuse_variants(model: MoeModel, layout: Layout, decoder: Decoder) -> None:
    """Of models that have one decoder, which is not batch-invariant."""
    if decoder == "hf" or layout.invariant:
        field = "engine.decoder" if decoder == "hf" else "engine.batch_invariant"
        raise Unsupported(f"{field}: not to be had of a {model.family}", field=field)


def _describe(
    checkpoint: Checkpoint, model: MoeModel, layout: Layout, decoder: Decoder
) -> DecoderLayout | None:
    """None: stock."""
    if decoder == "hf":
        if layout.invariant:
            raise InvalidArgument(
                "engine.batch_invariant: the hf decoder is not; use lean", field="engine.batch_invariant"
            )
        return None
    try:
        return describe_decoder(checkpoint, model)
    except Unsupported:
        if decoder == "lean" or layout.invariant:
            raise
        return None
