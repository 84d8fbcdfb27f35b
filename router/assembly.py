"""What a router is made of before it knows the epoch: text, model, cache, dispatcher; and how much the cache may take."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from moesaic.checkpoints.checkpoint import open_checkpoint
from moesaic.compute.device import choose_device, choose_dtype
from moesaic.epoch import Epoch
from moesaic.families import MoeModel, describe_model
from moesaic.settings import EngineSettings
from moesaic.v1 import common_pb2
from router.attention.views import Layout
from router.cache.kv_cache import KVCache
from router.cache.sizing import choose_max_model_len, make_block_pool, make_state_cache, make_state_pool
from router.config import RouterConfig
from router.decoders.decoder import RouterModel
from router.decoders.load import load_model
from router.dispatch.dispatcher import Dispatcher, DispatchRules
from router.engine.engine import Engine
from router.engine.overlap import Overlap
from router.phase_clock import PhaseClock
from router.scheduling.block_pool import BlockPool
from router.scheduling.prefill_budget import Pace
from router.scheduling.prefix_cache import PrefixCache
from router.scheduling.scheduler import Limits, Scheduler
from router.scheduling.state_pool import StatePool
from router.text.text import Text, load_text
from router.workers.replica_pool import ReplicaPool

log = logging.getLogger(__name__)

# Rows on the wire, by setting; `auto` is what the model computes in.
WIRE_DTYPES: dict[str, common_pb2.Dtype] = {
    "float32": common_pb2.DTYPE_FLOAT32,
    "bfloat16": common_pb2.DTYPE_BFLOAT16,
    "float8": common_pb2.DTYPE_FLOAT8_E4M3,
    "int8": common_pb2.DTYPE_INT8,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that is loaded from the checkpoint, ready for an epoch."""

    settings: EngineSettings
    shape: MoeModel
    text: Text
    model: RouterModel
    cache: KVCache
    blocks: BlockPool
    # Of a model that has recurrent states.
    states: StatePool | None
    dispatcher: Dispatcher
    clock: PhaseClock
    max_model_len: int

    def engine(self, epoch: Epoch) -> Engine:
        """An engine for sequences of `epoch`, not started."""
        settings = self.settings
        scheduler = Scheduler(
            Limits(
                settings.max_batch_tokens,
                settings.max_running_sequences,
                whole_prompts=self.encodes_prompts,
            ),
            self.blocks,
            prefixes=self._prefixes(epoch),
            pace=Pace(max_batch_tokens=settings.max_batch_tokens, max_stall=settings.max_stall),
            states=self.states,
        )
        return Engine(
            self.model,
            self.cache,
            scheduler,
            self.dispatcher,
            self.clock,
            epoch=epoch,
            # It would cut prompts.
            overlap=Overlap() if settings.overlap == "on" and not self.encodes_prompts else None,
            max_waiting=settings.max_waiting_sequences,
        )

    @property
    def encodes_prompts(self) -> bool:
        """Whether prompts are read by an encoder, as a whole."""
        return self.shape.num_encoder_layers > 0

    def _prefixes(self, epoch: Epoch) -> PrefixCache | None:
        """What an encoder makes of a prompt's beginning depends on its end: there is nothing to be shared."""
        if not self.settings.prefix_cache or self.encodes_prompts:
            return None
        return PrefixCache(self.blocks, epoch.id, self.states)


def load_parts(config: RouterConfig, pool: ReplicaPool, clock: PhaseClock) -> Parts:
    """Reads all but the expert weights. Raises CheckpointError, InvalidArgument."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    checkpoint = open_checkpoint(config.model)
    shape = describe_model(checkpoint, config.dense_layers)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, shape.dtype)
    dispatcher = Dispatcher(pool, clock, _dispatch_rules(config.engine))
    blocks = make_block_pool(config.engine, shape, dtype, device)
    max_model_len = choose_max_model_len(config.engine, shape, blocks.num_blocks * blocks.block_tokens)
    model = load_model(
        checkpoint,
        shape,
        Layout.of(
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
    return Parts(
        settings=config.engine,
        shape=shape,
        text=load_text(config.model),
        model=model,
        cache=cache,
        blocks=blocks,
        states=states,
        dispatcher=dispatcher,
        clock=clock,
        max_model_len=max_model_len,
    )


def _dispatch_rules(settings: EngineSettings) -> DispatchRules:
    return DispatchRules(
        call_timeout_s=settings.call_timeout_s,
        wire_dtype=WIRE_DTYPES.get(settings.wire_dtype),
        combine_sum=settings.combine == "sum",
    )
