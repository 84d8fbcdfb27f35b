"""The side of `transformers` on a device: the shape and the dense weights of a checkpoint, experts made where they are computed.

Answers the commands of transformers_side.py, with all its ways of running and one more: `generate` with a static cache,
which on a GPU compiles the decode step into CUDA graphs by itself.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness.random_experts import fill_expert
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor
from transformers_side import MAX_GATHER_BYTES, Model, answer_commands

# A static cache is made for one length, and another length is compiled anew: always the same.
GENERATED = 64
# In half of the memory that a copy of the weights leaves.
GENERATE_GATHER_BYTES = 4 * MAX_GATHER_BYTES
COMPILED = "generate, static cache, compiled"


class DeviceModel(Model):
    """Also tries `generate`, unless the experts that one step's tokens gather are too many for the memory."""

    def __init__(self, model: Any, *, compiles: bool) -> None:
        super().__init__(model)
        self._compiles = compiles
        # Batch sizes that `generate` is the fastest for.
        self._generates: set[int] = set()

    def choose(self, batch: int, prompt_length: int, for_prefill: bool) -> dict[str, Any]:
        chosen = super().choose(batch, prompt_length, for_prefill)
        if for_prefill or not self._compiles or batch * self._gather_bytes() > GENERATE_GATHER_BYTES:
            return chosen
        ids = torch.randint(0, self._model.config.vocab_size, (batch, prompt_length)).tolist()
        try:
            self._generate(ids)  # compiles
            step_s = self._generate(ids)["seconds"] / GENERATED
        except (
            Exception
        ) as error:  # a compiler has a hundred ways to fail, and the other ways are known by now
            print(f"generate with batch {batch} failed: {error}", file=sys.stderr)
            return chosen
        if step_s < min(chosen["seconds"].values()):
            self._generates.add(batch)
            chosen["choice"] = COMPILED
        chosen["seconds"][COMPILED] = step_s
        return chosen

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        return self._generate(prompts) if len(prompts) in self._generates else super().decode(prompts, steps)

    def _generate(self, prompts: list[list[int]]) -> dict[str, Any]:
        """`GENERATED` steps behind the prompt; the clock runs from the first logits to the last."""
        self._model.set_experts_implementation("grouped_mm")  # `generate` takes batched_mm to decode
        clock = _Clock()
        ids = torch.tensor(prompts, device=self._model.device)
        with torch.inference_mode():
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
        seconds = clock.times_s[-1] - clock.times_s[0]
        return {
            "seconds": seconds,
            "tokens_per_s": len(prompts) * GENERATED / seconds,
            "token_ids": answer[:, ids.shape[1] :].tolist(),
        }


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cuda":
            torch.cuda.synchronize(scores.device)
        self.times_s.append(time.perf_counter())
        return scores


@torch.inference_mode()
def build(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in the memory of the device; there is never a second copy of it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # Never stops by itself.
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


def main(
    model: Path,
    threads: Annotated[int, typer.Option(min=1)],
    device: Annotated[str, typer.Option()],
    dtype: Annotated[str, typer.Option()],
    compiles: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Answers commands until its input ends."""
    torch.set_num_threads(threads)
    built = build(model, torch.device(device), getattr(torch, dtype))
    answer_commands(DeviceModel(built, compiles=compiles))


if __name__ == "__main__":
    typer.run(main)
