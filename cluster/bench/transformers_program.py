"""Decodes batches with transformers in one process, greedily and in the fastest way that it has.

This is the other side of `moesaic bench --against transformers` and of the project's own benchmarks. It is a
program of its own, so that neither its memory nor its threads touch the cluster; torch chooses its threads
and how they wait. The protocol is one JSON object a line: batches on standard input, what they took on
standard output. The first line of the output says that the model is loaded.

For every size of a batch the program first tries all implementations of the experts, each with a cache that
grows and with one of a fixed size, and keeps the fastest: one for reading prompts, one for decoding. Nothing
is padded, and logits are computed for the last position alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import IO, Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from moesaic.compute.device import choose_device, choose_dtype
from moesaic.settings import Device, DType

TRIAL_READS = 2
TRIAL_STEPS = 3
# A trial reads at most this many tokens: beyond some hundred rows the order of the ways no longer changes.
TRIAL_TOKENS = 512
# The largest share of the free memory that a trial may take by its own arithmetic.
MAX_MEMORY_SHARE = 0.25
CACHES = ("dynamic", "static")


@dataclass(frozen=True, slots=True)
class Way:
    """An implementation of the experts, of which `eager` is a loop, and a kind of cache."""

    experts: str
    cache: str

    def __str__(self) -> str:
        return f"{self.experts}, {self.cache} cache"


@dataclass(frozen=True, slots=True)
class Trials:
    """Seconds of every way that could be tried: to read the prompts, and for one step of decoding."""

    reading_s: Mapping[str, float]
    decoding_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch took. `decode_s` covers all steps after the first token."""

    prefill_s: float
    decode_s: float
    # The tokens of each sequence.
    token_ids: Sequence[Sequence[int]]
    reading: str
    decoding: str
    trials: Trials


class PlainModel:
    """A transformers model, with the fastest ways found for each size of a batch."""

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False)
        self._device: torch.device = model.device
        self._reading: dict[tuple[int, int], Mapping[Way, float]] = {}
        self._decoding: dict[tuple[int, int], Mapping[Way, float]] = {}

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
        """Decodes `num_tokens` for prompts of one length."""
        ids = torch.tensor(prompts, device=self._device)
        size = (ids.shape[0], ids.shape[1])
        if size not in self._reading:
            self._reading[size] = self._try_reading(ids)
        reading = decoding = _fastest(self._reading[size])
        if num_tokens > 1:
            if size not in self._decoding:
                self._decoding[size] = self._try_decoding(ids, reading.experts)
            decoding = _fastest(self._decoding[size])
        prefill_s, decode_s, token_ids = self._time(ids, reading.experts, decoding, num_tokens)
        trials = Trials(_by_name(self._reading[size]), _by_name(self._decoding.get(size, {})))
        return Batch(prefill_s, decode_s, token_ids, str(reading), str(decoding), trials)

    def _try_reading(self, ids: torch.Tensor) -> Mapping[Way, float]:
        some = ids[: max(1, TRIAL_TOKENS // ids.shape[1])]

        def trial_s(way: Way) -> float:
            self._time(some, way.experts, way, 1)
            return min(self._time(some, way.experts, way, 1)[0] for _ in range(TRIAL_READS))

        return {way: _unless_impossible(trial_s, way) for way in self._usable(some.numel())}

    def _try_decoding(self, ids: torch.Tensor, reading: str) -> Mapping[Way, float]:
        some = ids[:, : max(1, TRIAL_TOKENS // ids.shape[0])]

        def trial_s(way: Way) -> float:
            self._time(some, reading, way, 2)
            return self._time(some, reading, way, 1 + TRIAL_STEPS)[1] / TRIAL_STEPS

        return {way: _unless_impossible(trial_s, way) for way in self._usable(len(some))}

    def _time(
        self, ids: torch.Tensor, reading: str, way: Way, num_tokens: int
    ) -> tuple[float, float, list[list[int]]]:
        """Seconds to the first token, seconds of all later ones, and the tokens of each sequence.

        The experts `reading` read the prompts [B, T]; `way` decodes.
        """
        room = ids.shape[1] + num_tokens
        config = self._model.config
        self._model.set_experts_implementation(reading)
        start_s = time.perf_counter()
        cache = (
            StaticCache(config=config, max_cache_len=room)
            if way.cache == "static"
            else DynamicCache(config=config)
        )
        tokens = [self._step(ids, cache)]
        self._synchronize()
        prefill_s = time.perf_counter() - start_s
        self._model.set_experts_implementation(way.experts)
        start_s = time.perf_counter()
        for _ in range(num_tokens - 1):
            tokens.append(self._step(tokens[-1], cache))
        self._synchronize()
        decode_s = time.perf_counter() - start_s
        return prefill_s, decode_s, torch.cat(tokens, dim=1).tolist()

    def _step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """One forward of new tokens [B, T]; the next token of each sequence [B, 1]."""
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        next_ids: torch.Tensor = logits[:, -1].argmax(dim=-1, keepdim=True)
        return next_ids

    def _synchronize(self) -> None:
        """Waits for a GPU, which computes asynchronously."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _usable(self, num_tokens: int) -> list[Way]:
        """All ways, without those that copy every token's experts where the copies would not fit."""
        names = ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]
        if self._gathered_bytes(num_tokens) > MAX_MEMORY_SHARE * self._free_bytes():
            names.remove("batched_mm")
        return [Way(*way) for way in product(names, CACHES)]

    def _gathered_bytes(self, num_tokens: int) -> int:
        """The size of the weights of every token's experts, copied out for one layer."""
        config = self._model.config.get_text_config()
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        weights = 3 * config.hidden_size * inner * config.num_experts_per_tok
        return int(num_tokens * weights * self._model.dtype.itemsize)

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return int(psutil.virtual_memory().available)


def _unless_impossible(trial_s: Callable[[Way], float], way: Way) -> float:
    """Infinite where this model cannot run that way here; kernels and caches fail in many ways."""
    try:
        return trial_s(way)
    except Exception:
        return math.inf


def _fastest(seconds: Mapping[Way, float]) -> Way:
    return min(seconds, key=lambda way: seconds[way])


def _by_name(seconds: Mapping[Way, float]) -> dict[str, float]:
    return {str(way): each_s for way, each_s in seconds.items() if each_s < math.inf}


def answer_batches(load: Callable[[], PlainModel]) -> None:
    """Loads the model, then answers one line of standard input after another."""
    answers = _own_stdout()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.inference_mode():
        model = load()
        _say(answers, {"threads": torch.get_num_threads()})
        for line in sys.stdin:
            asked = json.loads(line)
            _say(answers, asdict(model.run(asked["prompts"], asked["num_tokens"])))


def _own_stdout() -> IO[str]:
    """The real standard output; from now on whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def main(folder: str, dtype: DType, device: Device, stored: str) -> None:
    """`dtype` and `device` are settings of the cluster; `stored` is the type of the weights on disk."""

    def load() -> PlainModel:
        place = choose_device(device)
        kind = choose_dtype(dtype, place, stored)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
        torch.nn.Module.to(model, place)
        return PlainModel(model)

    answer_batches(load)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
