"""How much memory the caches take, and how long a sequence may be as a result."""

from __future__ import annotations

import logging

import torch

from moesaic.errors import InvalidArgument
from moesaic.families import MoeModel
from moesaic.families.model import Hyena
from moesaic.machine_memory import read_memory
from moesaic.settings import EngineSettings
from router.cache.kv_cache import KVCache
from router.cache.state_cache import StateCache
from router.scheduling.block_pool import BlockPool
from router.scheduling.state_pool import StatePool

log = logging.getLogger(__name__)

# Bounds of the KV cache without a setting: it holds one sequence of full length, but takes at least this much
# memory and at most this share of the free memory.
MIN_CACHE_BYTES = 256 << 20
MAX_CACHE_SHARE = 0.25


def make_block_pool(
    settings: EngineSettings, shape: MoeModel, dtype: torch.dtype, device: torch.device
) -> BlockPool:
    token_bytes = KVCache.token_bytes(shape.mixers, dtype)
    if settings.kv_cache_mib is not None:
        cache_bytes = settings.kv_cache_mib << 20
    else:
        one_sequence = token_bytes * shape.context_length(settings.max_model_len)
        most = int(_free_bytes(device) * MAX_CACHE_SHARE)
        cache_bytes = min(max(MIN_CACHE_BYTES, one_sequence), most)
    # A token of a model without attention takes no bytes, and counts as one byte.
    num_blocks = max(1, cache_bytes // (max(1, token_bytes) * settings.kv_block_tokens))
    return BlockPool(num_blocks, settings.kv_block_tokens)


def make_state_pool(settings: EngineSettings, shape: MoeModel) -> StatePool | None:
    """Slots for as many snapshots as sequences may run. None for a model without recurrent states."""
    if not any(isinstance(mixer, Hyena) for mixer in shape.mixers):
        return None
    return StatePool(settings.max_running_sequences, settings.max_running_sequences)


def make_state_cache(
    shape: MoeModel, states: StatePool, dtype: torch.dtype, device: torch.device
) -> StateCache:
    return StateCache(shape.mixers, shape.hidden_size, num_slots=states.num_slots, dtype=dtype, device=device)


def _free_bytes(device: torch.device) -> int:
    """The free bytes of the memory in which the cache will lie: on a CPU, what the limit of a container leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    _, available = read_memory()
    return available


def choose_max_model_len(settings: EngineSettings, shape: MoeModel, num_positions: int) -> int:
    """The longest sequence that model and cache allow. A length that was set is served or refused with
    InvalidArgument, never cut."""
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
