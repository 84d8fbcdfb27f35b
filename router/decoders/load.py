"""Chooses the decoder of a checkpoint: our own where it supports the model, else the modules of transformers."""

from __future__ import annotations

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.errors import InvalidArgument, Unsupported
from moesaic.families.encoder_decoder import EncoderDecoderModel
from moesaic.families.model import MoeModel
from moesaic.families.stripedhyena import StripedHyenaModel
from moesaic.settings import CapacityLimit, Decoder
from router.attention.views import AttentionLayout
from router.decoders.decoder import RouterModel
from router.decoders.encoder_decoder.decoder import EncoderDecoder
from router.decoders.lean.decoder import LeanDecoder
from router.decoders.lean.supported import SupportedModel, check_supported
from router.decoders.stripedhyena.decoder import StripedHyena
from router.phase_clock import PhaseClock


def load_model(
    checkpoint: Checkpoint,
    model: MoeModel,
    layout: AttentionLayout,
    *,
    decoder: Decoder,
    num_positions: int,
    clock: PhaseClock,
    capacity: CapacityLimit = "off",
) -> RouterModel:
    """Reads all weights but those of the experts, for sequences of at most `num_positions` tokens.

    Raises CheckpointError; Unsupported where the settings ask for a decoder that does not support the model, or for a
    capacity that the family does not have.
    """
    if capacity == "model" and all(experts.capacity is None for experts in model.experts.values()):
        raise Unsupported(
            f"engine.capacity: experts of a {model.family} have none; use off", field="engine.capacity"
        )
    if isinstance(model, StripedHyenaModel | EncoderDecoderModel):
        _refuse_variants(model, layout, decoder)
    if isinstance(model, EncoderDecoderModel):
        return EncoderDecoder(
            checkpoint,
            model,
            layout,
            num_positions=num_positions,
            clock=clock,
            limits_slots=capacity == "model",
        )
    if isinstance(model, StripedHyenaModel):
        return StripedHyena(checkpoint, model, layout, num_positions=num_positions, clock=clock)
    supported = _supported(checkpoint, model, layout, decoder)
    if supported is not None:
        return LeanDecoder(checkpoint, supported, layout, num_positions=num_positions, clock=clock)
    # Imported here because the modelling code of transformers takes 90 MiB, which a lean router saves.
    from router.decoders.hf.decoder import HfDecoder

    return HfDecoder(checkpoint, model, layout, num_positions=num_positions, clock=clock)


def _refuse_variants(model: MoeModel, layout: AttentionLayout, decoder: Decoder) -> None:
    """Refuses the settings that choose among decoders: the model has only one, and it is not batch-invariant."""
    if decoder == "hf" or layout.invariant:
        field = "engine.decoder" if decoder == "hf" else "engine.batch_invariant"
        raise Unsupported(f"{field}: not available for a {model.family}", field=field)


def _supported(
    checkpoint: Checkpoint, model: MoeModel, layout: AttentionLayout, decoder: Decoder
) -> SupportedModel | None:
    """The model as the lean decoder runs it, or None where the modules of transformers run it."""
    if decoder == "hf":
        if layout.invariant:
            raise InvalidArgument(
                "engine.batch_invariant: the hf decoder is not; use lean", field="engine.batch_invariant"
            )
        return None
    try:
        return check_supported(checkpoint, model)
    except Unsupported:
        if decoder == "lean" or layout.invariant:
            raise
        return None
