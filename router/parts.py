"""What a router is made of before it knows the epoch: text, model, cache, dispatcher; and how much the cache may take."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from moesaic.checkpoint import open_checkpoint
from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel, describe_model
from moesaic.manifest import Epoch
from moesaic.settings import EngineSettings
from moesaic.tensors import choose_device, choose_dtype
from moesaic.v1 import common_pb2
from router.batch import Layout
from router.config import RouterConfig
from router.dispatcher import Dispatcher, DispatchRules
from router.engine import Engine
from router.kv_cache import BlockPool, KVCache
from router.model import RouterModel
from router.model_loader import load_model
from router.overlap import Overlap
from router.pace import Pace
from router.phases import PhaseClock
from router.prefix_cache import PrefixCache
from router.replica_pool import ReplicaPool
from router.scheduler import Limits, Scheduler
from router.text import Text, load_text

log = logging.getLogger(__name__)

# Rows on the wire, by setting; `auto` is what the model computes in.
WIRE_DTYPES: dict[str, common_pb2.Dtype] = {
    "float32": common_pb2.DTYPE_FLOAT32,
    "bfloat16": common_pb2.DTYPE_BFLOAT16,
    "float8": common_pb2.DTYPE_FLOAT8_E4M3,
    "int8": common_pb2.DTYPE_INT8,
}

# Without a setting the cache holds one sequence of full length, at least this much, at most this share of the memory.
MIN_CACHE_BYTES = 256 << 20
MAX_CACHE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that is loaded from the checkpoint, ready for an epoch."""

    settings: EngineSettings
    shape: MoeModel
    text: Text
    model: RouterModel
    cache: KVCache
    blocks: BlockPool
    dispatcher: Dispatcher
    clock: PhaseClock
    max_model_len: int

    def engine(self, epoch: Epoch) -> Engine:
        """An engine for sequences of `epoch`, not started."""
        settings = self.settings
        scheduler = Scheduler(
            Limits(settings.max_batch_tokens, settings.max_running_sequences),
            self.blocks,
            prefixes=PrefixCache(self.blocks, epoch.id) if settings.prefix_cache else None,
            pace=Pace(max_batch_tokens=settings.max_batch_tokens, max_stall=settings.max_stall),
        )
        return Engine(
            self.model,
            self.cache,
            scheduler,
            self.dispatcher,
            self.clock,
            epoch=epoch,
            overlap=Overlap() if settings.overlap == "auto" else None,
            max_waiting=settings.max_waiting_sequences,
        )


def load_parts(config: RouterConfig, pool: ReplicaPool, clock: PhaseClock) -> Parts:
    """Reads all but the expert weights. Raises CheckpointError, InvalidArgument."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    checkpoint = open_checkpoint(config.model)
    shape = describe_model(checkpoint)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, shape.dtype)
    dispatcher = Dispatcher(pool, clock, _dispatch_rules(config.engine))
    blocks = _block_pool(config.engine, shape, dtype, device)
    max_model_len = _max_model_len(config.engine, shape, blocks.num_blocks * blocks.block_tokens)
    model = load_model(
        checkpoint,
        shape,
        Layout(
            block_tokens=blocks.block_tokens,
            window=shape.sliding_window,
            device=device,
            dtype=dtype,
            invariant=config.engine.batch_invariant,
        ),
        decoder=config.engine.decoder,
        num_positions=max_model_len,
        clock=clock,
    )
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
    )
    return Parts(
        settings=config.engine,
        shape=shape,
        text=load_text(config.model),
        model=model,
        cache=cache,
        blocks=blocks,
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


def _block_pool(
    settings: EngineSettings, shape: MoeModel, dtype: torch.dtype, device: torch.device
) -> BlockPool:
    token_bytes = KVCache.token_bytes(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)
    if settings.kv_cache_mib is not None:
        cache_bytes = settings.kv_cache_mib << 20
    else:
        one_sequence = token_bytes * shape.context_length(settings.max_model_len)
        most = int(_free_bytes(device) * MAX_CACHE_SHARE)
        cache_bytes = min(max(MIN_CACHE_BYTES, one_sequence), most)
    num_blocks = max(1, cache_bytes // (token_bytes * settings.kv_block_tokens))
    return BlockPool(num_blocks, settings.kv_block_tokens)


def _free_bytes(device: torch.device) -> int:
    """Of the memory that the cache will lie in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _max_model_len(settings: EngineSettings, shape: MoeModel, num_positions: int) -> int:
    """What model and cache allow. A length that was asked for is served or refused, never cut."""
    longest = shape.context_length(settings.max_model_len)
    if longest <= num_positions:
        return longest
    if settings.max_model_len is not None:
        raise InvalidArgument(
            f"max_model_len: the KV cache holds {num_positions} tokens; raise engine.kv_cache_mib",
            field="max_model_len",
        )
    log.warning(
        "the KV cache is shorter than the context", extra={"fields": {"max_model_len": num_positions}}
    )
    return num_positions
