"""transformers on a device: a checkpoint's shape and dense weights, with experts that are made there.

Answers as `cluster.bench.transformers_program` does, with all its ways of computing and one more: `generate`
with a static cache, which on a GPU compiles the decode step into CUDA graphs by itself.

Run by h200.py: python benchmarks/peers/device_side.py FOLDER DEVICE DTYPE compile|plain
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.random_experts import fill_expert
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from cluster.bench.transformers_program import Batch, PlainModel, answer_batches

# A static cache is made for one length and is compiled anew for another, so the length is always the same.
GENERATED = 64
# `generate` is not tried where one step's tokens gather more weights than this: half of what a copy of the
# model leaves.
MAX_GATHER_BYTES = 16 << 30
COMPILED = "generate, static cache, compiled"


class DeviceModel(PlainModel):
    """Also tries `generate`, unless the weights that one step's tokens gather are too large."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Seconds of a step of `generate` by the size of a batch; infinite where it fails.
        self._generate_s: dict[int, float] = {}

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Batch:
        batch = super().run(prompts, num_tokens)
        size = len(prompts)
        if num_tokens == 1 or self._gathered_bytes(size) > MAX_GATHER_BYTES:
            return batch
        if size not in self._generate_s:
            self._generate_s[size] = self._try_generate(prompts)
        trials_s = {**batch.trials.decoding_s, COMPILED: self._generate_s[size]}
        if min(trials_s, key=lambda way: trials_s[way]) == COMPILED:
            seconds, token_ids = self._generate(prompts)
            batch = replace(batch, decode_s=seconds, token_ids=token_ids, decoding=COMPILED)
        return replace(batch, trials=replace(batch.trials, decoding_s=trials_s))

    def _try_generate(self, prompts: Sequence[Sequence[int]]) -> float:
        try:
            self._generate(prompts)  # This one compiles.
            return self._generate(prompts)[0] / GENERATED
        except Exception as error:  # A compiler fails in many ways, and the other ways are known by now.
            print(f"generate with batch {len(prompts)} failed: {error}", file=sys.stderr)
            return math.inf

    def _generate(self, prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
        """Seconds of `GENERATED` steps, from the first logits to the last, and the tokens."""
        self._model.set_experts_implementation(
            "grouped_mm"
        )  # `generate` itself would decode with batched_mm.
        clock = _Clock()
        ids = torch.tensor(prompts, device=self._device)
        answer = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=GENERATED + 1,
                cache_implementation="static",
                pad_token_id=0,
            ),
            logits_processor=[clock],
        )
        return clock.times_s[-1] - clock.times_s[0], answer[:, ids.shape[1] :].tolist()


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; notes when the logits of each step are computed."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cuda":
            torch.cuda.synchronize(scores.device)
        self.times_s.append(time.perf_counter())
        return scores


def build(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in the memory of the device; there is never a second copy of it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Without an end-of-sequence token no answer stops by itself.
    config.eos_token_id = None
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if ".experts." not in name:
                    parameter = model.get_parameter(name.replace(".block_sparse_moe.", ".mlp."))
                    parameter.copy_(shard.get_tensor(name))
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for slot, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            fill_expert(gate_up, down, index, slot)
    return model


def load(folder: str, device: str, dtype: str, how: str) -> PlainModel:
    model = build(Path(folder), torch.device(device), getattr(torch, dtype))
    return DeviceModel(model) if how == "compile" else PlainModel(model)


if __name__ == "__main__":
    answer_batches(partial(load, *sys.argv[1:]))
