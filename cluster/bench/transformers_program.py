"""The other side of `moesaic bench --against transformers`: the same model in one process, greedy, a batch at a time.

A program of its own, so that neither its memory nor its threads touch the cluster. One JSON object a line: batches on
standard input, what they took on standard output; the first line says that the model is loaded. For every size of a
batch it first tries the ways in which transformers can run experts and keeps the fastest, for prompts and for decoding
apart: torch's own threads and waiting, no padding, logits of the last position alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from moesaic.compute.device import choose_device, choose_dtype
from moesaic.settings import Device, DType

TRIAL_STEPS = 3
# Of prompts, a part stands for all: beyond some hundred rows nothing changes any more.
TRIAL_TOKENS = 512
# Of the free memory that a trial may take by its own arithmetic.
MAX_MEMORY_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch took. `decode_s`: each step after the first token."""

    prefill_s: float
    decode_s: tuple[float, ...]
    # The tokens of each sequence.
    token_ids: tuple[tuple[int, ...], ...]
    prefill_experts: str
    decode_experts: str


class PlainModel:
    """A transformers model and the fastest of its experts implementations for each size of a batch."""

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        torch.nn.Module.to(self._model, device)
        self._model.requires_grad_(False)
        self._chosen: dict[tuple[int, int], tuple[str, str]] = {}

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
        """Decodes `num_tokens` for prompts of one length."""
        ids = torch.tensor(prompts, device=self._device)
        for_prompts, for_decoding = self._choose(ids)
        cache = DynamicCache()
        next_ids, prefill_s = self._step(ids, cache, for_prompts)
        chosen, decode_s = [next_ids], []
        for _ in range(num_tokens - 1):
            next_ids, seconds = self._step(next_ids, cache, for_decoding)
            chosen.append(next_ids)
            decode_s.append(seconds)
        tokens = torch.cat(chosen, dim=1).tolist()
        return Batch(prefill_s, tuple(decode_s), tuple(map(tuple, tokens)), for_prompts, for_decoding)

    def _step(self, ids: torch.Tensor, cache: DynamicCache, experts: str) -> tuple[torch.Tensor, float]:
        """One forward of [B, T] new tokens, the next token [B, 1] of each, and the seconds it took."""
        self._model.set_experts_implementation(experts)
        start_s = time.perf_counter()
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        next_ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return next_ids, time.perf_counter() - start_s

    def _choose(self, ids: torch.Tensor) -> tuple[str, str]:
        """The fastest implementation for these prompts, and for decoding as many sequences."""
        size = (ids.shape[0], ids.shape[1])
        if size not in self._chosen:
            some = ids[: max(1, TRIAL_TOKENS // ids.shape[1])]
            self._chosen[size] = (self._fastest(some), self._fastest(ids[:, :1]))
        return self._chosen[size]

    def _fastest(self, ids: torch.Tensor) -> str:
        return min(self._usable(ids.numel()), key=lambda experts: self._trial_s(ids, experts))

    def _trial_s(self, ids: torch.Tensor, experts: str) -> float:
        """The best of some steps after one that is not counted; infinite where it does not run here."""
        try:
            cache = DynamicCache()
            self._step(ids, cache, experts)
            return min(self._step(ids, cache, experts)[1] for _ in range(TRIAL_STEPS))
        except (ImportError, NotImplementedError, RuntimeError, ValueError):
            return float("inf")

    def _usable(self, num_tokens: int) -> list[str]:
        """Without those that copy every token's weights where that would not fit."""
        names = ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]
        if self._gathered_bytes(num_tokens) > MAX_MEMORY_SHARE * psutil.virtual_memory().available:
            names.remove("batched_mm")
        return names

    def _gathered_bytes(self, num_tokens: int) -> int:
        """What the weights of every token's experts take, copied out for one layer."""
        config = self._model.config.get_text_config()
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        weights = 3 * config.hidden_size * inner * config.num_experts_per_tok
        return int(num_tokens * weights * self._model.dtype.itemsize)


def main(folder: str, dtype: DType, device: Device, stored: str) -> None:
    """`dtype`, `device`: as in the settings of the cluster; `stored`: the type of the weights on disk."""
    answers = _own_stdout()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.inference_mode():
        place = choose_device(device)
        model = PlainModel(folder, choose_dtype(dtype, place, stored), place)
        _say(answers, {"threads": torch.get_num_threads()})
        for line in sys.stdin:
            asked = json.loads(line)
            _say(answers, asdict(model.run(asked["prompts"], asked["num_tokens"])))


def _own_stdout() -> IO[str]:
    """The real standard output; whatever libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
