"""Puts a router together: text, model, caches, dispatcher, and the engine that runs on them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.checkpoints.identity import check_identity
from moesaic.compute.device import choose_device, choose_dtype
from moesaic.families import MoeModel, describe_model
from moesaic.settings import EngineSettings
from moesaic.wire.tensor_check import dtype_named
from router.attention.views import AttentionLayout
from router.cache.kv_cache import KVCache
from router.cache.sizing import choose_max_model_len, make_block_pool, make_state_cache, make_state_pool
from router.config import RouterConfig
from router.decoders.decoder import RouterModel
from router.decoders.load import load_model
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.dispatch.heartbeat import Heartbeat
from router.engine.engine import Engine
from router.gating.absence import stand_in_of
from router.gating.policy import LayerShape, check_restrictable, layer_shapes
from router.phase_clock import PhaseClock
from router.scheduling.admission import Admission, AdmissionLimits
from router.scheduling.block_pool import BlockPool
from router.scheduling.pace import PaceMeter
from router.scheduling.prefill_budget import PrefillBudget
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.state_pool import StatePool
from router.text.text import Text, load_text
from router.workers.replica_pool import ReplicaPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRouter:
    """Everything of a router that is loaded once, and from which its engine is made."""

    settings: EngineSettings
    shape: MoeModel
    text: Text
    model: RouterModel
    cache: KVCache
    blocks: BlockPool
    # None for a model without recurrent states.
    states: StatePool | None
    dispatcher: Dispatcher
    heartbeat: Heartbeat
    clock: PhaseClock
    max_model_len: int

    def engine(self) -> Engine:
        """An engine that has not been started."""
        settings = self.settings
        prefill_budget = PrefillBudget(
            max_batch_tokens=settings.max_batch_tokens, max_stall=settings.max_stall
        )
        scheduler = Scheduler(
            Limits(
                settings.max_batch_tokens,
                settings.max_running_sequences,
                whole_prompts=self.encodes_prompts,
            ),
            self.blocks,
            prefixes=self._prefixes(),
            prefill_budget=prefill_budget,
            states=self.states,
        )
        return Engine(
            self.model,
            self.cache,
            scheduler,
            self.dispatcher,
            self.clock,
            # Two micro-batches would cut the prompts that an encoder has to read as a whole.
            overlap=settings.overlap == "on" and not self.encodes_prompts,
            admission=Admission(
                AdmissionLimits(settings.max_running_sequences, settings.max_waiting_sequences),
                PaceMeter(prefill_budget),
            ),
            missing_wait_s=settings.missing_wait_s,
        )

    @property
    def encodes_prompts(self) -> bool:
        """Whether prompts are read as a whole, by an encoder."""
        return self.shape.num_encoder_layers > 0

    @property
    def gates(self) -> dict[int, LayerShape]:
        """What the model folder says of the experts of each layer."""
        return layer_shapes(self.shape, limits_slots=self.settings.capacity == "model")

    def _prefixes(self) -> PrefixCache | None:
        """None where an encoder reads prompts: what it computes for a beginning depends on the end."""
        if not self.settings.prefix_cache or self.encodes_prompts:
            return None
        return PrefixCache(self.blocks, self.states)


def load_router(config: RouterConfig, pool: ReplicaPool, clock: PhaseClock) -> LoadedRouter:
    """Reads everything but the expert weights. Raises CheckpointError, InvalidArgument."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    checkpoint = open_checkpoint(config.model)
    check_identity(checkpoint, config.identity, text=True)
    shape = describe_model(checkpoint, config.dense_layers)
    _check_on_missing(config.engine, shape)
    for name in shape.untied:
        log.warning(
            "a tensor in the files counts, although the config ties it", extra={"fields": {"tensor": name}}
        )
    text = load_text(config.model)
    if not text.has_tokenizer:
        log.warning("the model folder has no tokenizer: prompts are token ids only")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, shape.dtype)
    rules = _dispatch_rules(config.engine)
    blocks = make_block_pool(config.engine, shape, dtype, device)
    max_model_len = choose_max_model_len(config.engine, shape, blocks.num_blocks * blocks.block_tokens)
    model = load_model(
        checkpoint,
        shape,
        AttentionLayout.of(
            shape.mixers,
            block_tokens=blocks.block_tokens,
            device=device,
            dtype=dtype,
            invariant=config.engine.batch_invariant,
        ),
        decoder=config.engine.decoder,
        num_positions=max_model_len,
        clock=clock,
        capacity=config.engine.capacity,
    )
    states = make_state_pool(config.engine, shape)
    cache = KVCache(
        shape.mixers,
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        dtype=dtype,
        device=device,
        states=None if states is None else make_state_cache(shape, states, dtype, device),
    )
    return LoadedRouter(
        settings=config.engine,
        shape=shape,
        text=text,
        model=model,
        cache=cache,
        blocks=blocks,
        states=states,
        dispatcher=Dispatcher(pool, clock, rules),
        heartbeat=Heartbeat(pool, shape.hidden_size, dtype, rules.wire_dtype),
        clock=clock,
        max_model_len=max_model_len,
    )


def _check_on_missing(settings: EngineSettings, shape: MoeModel) -> None:
    """Raises FailedPrecondition where the model's gates cannot do without an expert as the setting says."""
    if stand_in_of(settings.on_missing) is not None:
        shapes = layer_shapes(shape, limits_slots=settings.capacity == "model")
        check_restrictable(shapes, field="engine.on_missing", what=f"{settings.on_missing} is ")


def _dispatch_rules(settings: EngineSettings) -> DispatchRules:
    return DispatchRules(
        call_timeout_s=settings.call_timeout_s,
        wire_dtype=None if settings.wire_dtype == "auto" else dtype_named(settings.wire_dtype),
        combine_sum=settings.combine == "sum",
    )
