"""The side of `transformers`: the whole model in one process, with the settings that suit it best.

Its own process and its own environment (no passive waiting, two threads of its own), fp32 weights, greedy. Reads one JSON
command a line and answers with one line; idles without using a CPU in between. Which `experts_implementation` and which
cache are fastest is tried for every batch size, once, before anything counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

# Weights gathered per token beyond this are not tried: batched_mm copies a token's experts.
MAX_GATHER_BYTES = 4 << 30
TRIAL_STEPS = 3


@dataclass(frozen=True)
class Choice:
    """A way to run the model; `eager` loops over experts."""

    experts: str
    cache: str


CHOICES = tuple(
    Choice(experts, cache)
    for experts in ("eager", "grouped_mm", "batched_mm")
    for cache in ("dynamic", "static")
)


class Model:
    """The model, and the choice found for every batch shape."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._best: dict[tuple[int, int], Choice] = {}

    def choose(self, batch: int, prompt_length: int, for_prefill: bool) -> dict[str, Any]:
        """Tries every choice once on random tokens; the fastest is kept for this shape."""
        ids = torch.randint(0, self._model.config.vocab_size, (batch, prompt_length)).tolist()
        seconds: dict[str, float] = {}
        best: tuple[float, Choice] | None = None
        for choice in CHOICES:
            tokens = batch * (prompt_length if for_prefill else 1)
            if choice.experts == "batched_mm" and tokens * self._gather_bytes() > MAX_GATHER_BYTES:
                continue
            if for_prefill:
                self._prefill(ids, choice, 1)
                taken = min(self._prefill(ids, choice, 1)[0] for _ in range(2))
            else:
                self._decode(ids, choice, 1, prefill_with=CHOICES[2])
                taken = (
                    self._decode(ids, choice, TRIAL_STEPS, prefill_with=CHOICES[2])["seconds"] / TRIAL_STEPS
                )
            seconds[f"{choice.experts}, {choice.cache} cache"] = taken
            if best is None or taken < best[0]:
                best = taken, choice
        assert best is not None
        self._best[batch, int(for_prefill)] = best[1]
        return {"choice": f"{best[1].experts}, {best[1].cache} cache", "seconds": seconds}

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        return self._decode(prompts, self._best[len(prompts), 0], steps, prefill_with=CHOICES[2])

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        seconds, token, _ = self._prefill([prompt], self._best[1, 1], 1)
        return {"seconds": seconds, "token_ids": token.tolist()}

    def _decode(
        self, prompts: list[list[int]], choice: Choice, steps: int, *, prefill_with: Choice
    ) -> dict[str, Any]:
        """The prompt is read by `prefill_with`'s experts; the clock runs over the steps alone."""
        _, token, cache = self._prefill(prompts, Choice(prefill_with.experts, choice.cache), steps + 1)
        self._model.set_experts_implementation(choice.experts)
        tokens = [token]
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                logits = self._model(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits
                tokens.append(logits[:, -1].argmax(-1))
        # On a GPU nothing is there before it is read.
        token_ids = torch.stack(tokens, dim=1).tolist()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens_per_s": len(prompts) * steps / seconds,
            "token_ids": token_ids,
        }

    def _prefill(
        self, prompts: list[list[int]], choice: Choice, room: int
    ) -> tuple[float, torch.Tensor, Any]:
        """Seconds to the first token, that token [batch], and the cache with `room` for more."""
        self._model.set_experts_implementation(choice.experts)
        ids = torch.tensor(prompts, device=self._model.device)
        start = time.perf_counter()
        config = self._model.config
        with torch.inference_mode():
            cache: Any = (
                StaticCache(config=config, max_cache_len=ids.shape[1] + room)
                if choice.cache == "static"
                else DynamicCache(config=config)
            )
            logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1)
        token.tolist()  # on a GPU it is there only now
        return time.perf_counter() - start, token, cache

    def _gather_bytes(self) -> int:
        """Weights that one token's experts of a layer have."""
        config = self._model.config
        return int(
            self._model.dtype.itemsize
            * 3
            * config.num_experts_per_tok
            * config.hidden_size
            * config.intermediate_size
        )


def main(model: Path, threads: Annotated[int, typer.Option(min=1)]) -> None:
    """Answers commands until its input ends."""
    torch.set_num_threads(threads)
    answer_commands(Model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()))


def answer_commands(side: Model) -> None:
    """Answers commands until the input ends; the first line says that it may begin."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "choose": side.choose,
        "decode": side.decode,
        "prefill": side.prefill,
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(commands[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    typer.run(main)
