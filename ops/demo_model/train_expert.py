"""Train one more expert per layer of the demo model, for arithmetic, while the model itself stays frozen.

    python ops/demo_model/train_expert.py --corpus FOLDER --out FOLDER --steps N

Writes a checkpoint of the base with one more expert per layer. Only these experts and their gate rows
learn. The other domains are read along with arithmetic, and a hinge loss on the gate keeps their tokens away
from the newcomers: a text that never chooses one is computed exactly as before.

Shapes: B windows, T tokens each, N = B*T rows, E experts with the newcomer last, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arithmetic import problems
from corpus import Stream, draw_window, encode, load_domains
from newcomer import Newcomer, newcomers_of, write_checkpoint
from sums import held_out_sums, training_sums, without
from torch import Tensor, nn
from train import grouped_experts, sampling_shares, training_streams
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BASE = Path(__file__).parents[2] / "cluster" / "demo_model"


@dataclass(frozen=True)
class Recipe:
    batch_tokens: int = 1024
    # (share of the training after which it begins, window length): a sum is short, and so is its context at
    # first; the last steps teach the newcomer to work in a longer text.
    windows: tuple[tuple[float, int], ...] = ((0.0, 64), (0.9, 512))
    learning_rate: float = 3e-3
    warmup_share: float = 0.03
    clip: float = 1.0
    # In every third step windows of bare sums, of other arithmetic and of the base's domains come in these
    # shares. In the other steps each row begins with <s> and a bare sum, as it is asked: what comes before a
    # sum in a longer window only distracts an attention that cannot learn.
    mixed_every: int = 3
    sums: float = 0.3
    problems: float = 0.35
    domains: float = 0.35
    # The tokens of the longest sum with the end of its line.
    sum_length: int = 12
    # Texts of arithmetic that are written before the training draws from them.
    texts: int = 60_000
    # A digit of an answer counts as much as this many other tokens, whose digits nobody can foresee.
    answer_weight: float = 16.0
    # The gate loss counts this much, and asks that the newcomer's logit wins or loses a place among the
    # chosen by this margin.
    gate: float = 0.5
    margin: float = 1.0
    log_steps: int = 100


RECIPE = Recipe()


@dataclass(frozen=True)
class Tokens:
    """Which ids are a digit, an equals sign and a lone space: [V] bool each."""

    digit: Tensor
    equals: Tensor
    space: Tensor


@dataclass(frozen=True)
class Batch:
    """Windows [B, T+1], and which of them are arithmetic, [B] bool."""

    windows: Tensor
    arithmetic: Tensor


def classify(tokenizer: PreTrainedTokenizerFast) -> Tokens:
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return Tokens(
        torch.tensor([piece.isdigit() for piece in pieces]),
        torch.tensor([piece.strip() == "=" for piece in pieces]),
        torch.tensor([piece == " " for piece in pieces]),
    )


def answer_digits(ids: Tensor, tokens: Tokens) -> Tensor:
    """The digits, [B, T] bool, of `ids` [B, T] that follow an equals sign with nothing else between."""
    digit, equals, space = tokens.digit[ids], tokens.equals[ids], tokens.space[ids]
    place = torch.arange(1, ids.shape[1] + 1).expand_as(ids)
    last_equals = (place * equals).cummax(1).values
    last_other = (place * ~(digit | equals | space)).cummax(1).values
    return digit & (last_equals > last_other)


def gate_loss(logits: Tensor, wanted: Tensor, top_k: int, margin: float) -> Tensor:
    """How far the newcomer is from being chosen by the wanted rows and by no others, by a margin.

    `logits` [N, E] of one layer and `wanted` [N] bool; the two kinds of row weigh the same, however many.
    """
    bar = logits[:, :-1].topk(top_k).values[:, -1]  # what the last of the chosen has without the newcomer
    lead = (logits[:, -1] - bar).float()
    missed = F.relu(margin - torch.where(wanted, lead, -lead))
    return mean_over(wanted, missed) + mean_over(~wanted, missed)


def mean_over(rows: Tensor, values: Tensor) -> Tensor:
    """The mean of the values [N] of some rows, [N] bool; zero when there are none."""
    return (values * rows).sum() / rows.sum().clamp(min=1)


def make_loss(model: MixtralForCausalLM) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    top_k = model.config.num_experts_per_tok

    def loss(windows: Tensor, weights: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted cross-entropy of windows [B, T+1] by weights [B, T], and the gates' loss."""
        with torch.autocast("cpu", torch.bfloat16):
            out = model.model(windows[:, :-1], use_cache=False, output_router_logits=True)
            logits = model.lm_head(out.last_hidden_state).float()  # [B, T, V]
        each = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        cross_entropy = (each * weights.flatten()).sum() / weights.sum()
        gates = [gate_loss(rows, wanted.flatten(), top_k, RECIPE.margin) for rows in out.router_logits]
        return cross_entropy, torch.stack(gates).mean()

    return loss


def learning_rate(progress: float) -> float:
    """A linear warm-up, then a cosine down to nothing; `progress` goes from 0 to 1."""
    warm = min(1.0, max(progress, 1e-3) / RECIPE.warmup_share)
    return RECIPE.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2


def window_length(progress: float) -> int:
    return [length for begin, length in RECIPE.windows if progress >= begin][-1]


def arithmetic_streams(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Stream]:
    """Bare sums, and problems of every kind; neither works out a sum that is held out."""
    held_out = held_out_sums()
    sums = [s.text for s in training_sums(RECIPE.texts, held_out, seed + 1)]
    others = without(held_out, problems(RECIPE.texts, seed + 1))
    return [encode(["\n\n".join(texts)], tokenizer) for texts in (sums, others)]


@dataclass(frozen=True)
class Source:
    """What batches are drawn from: streams of arithmetic first, then those of the domains."""

    streams: list[Stream]
    shares: Tensor
    arithmetic: int
    bos: int

    def draw(self, length: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        count = RECIPE.batch_tokens // length
        picks = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        windows = [draw_window(self.streams[pick], length, self.bos, generator) for pick in picks.tolist()]
        return Batch(torch.stack(windows), picks < self.arithmetic)

    def draw_sums(self, length: int, seed: int) -> Batch:
        """Rows that each begin with <s> and a bare sum."""
        generator = torch.Generator().manual_seed(seed)
        sums, count = self.streams[0], RECIPE.batch_tokens // length
        starts = sums.starts[sums.starts < len(sums.ids) - length]
        begin = starts[torch.randint(len(starts), (count, 1), generator=generator)]
        rows = sums.ids[begin + torch.arange(length)].long()
        windows = torch.cat([torch.full((count, 1), self.bos), rows], dim=1)
        return Batch(windows, torch.ones(count, dtype=torch.bool))

    def draw_step(self, step: int, progress: float, seed: int) -> Batch:
        """The batch of a step, drawn by the seed and the step alone; its length depends on the progress."""
        step_seed = seed * 1_000_003 + step
        if step % RECIPE.mixed_every:
            return self.draw_sums(RECIPE.sum_length, step_seed)
        return self.draw(window_length(progress), step_seed)


def load_source(corpus: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Source:
    arithmetic = arithmetic_streams(tokenizer, seed)
    domains = training_streams(load_domains(corpus), tokenizer)
    domain_shares = sampling_shares(domains)
    own = torch.tensor([RECIPE.sums, RECIPE.problems])
    shares = torch.cat([own, RECIPE.domains * domain_shares / domain_shares.sum()])
    return Source([*arithmetic, *domains], shares, len(arithmetic), int(tokenizer.bos_token_id))


@contextmanager
def gate_inputs(model: Any) -> Iterator[list[Tensor]]:
    """The rows [N, D] that reach the gate of every layer in the last pass of the block."""
    rows = [torch.empty(0) for _ in model.model.layers]

    def keep(layer: int) -> Any:
        def hook(gate: Any, inputs: tuple[Tensor]) -> None:
            rows[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return hook

    hooks = [layer.mlp.gate.register_forward_pre_hook(keep(i)) for i, layer in enumerate(model.model.layers)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def initial_newcomers(model: Any, batch: Batch) -> list[Newcomer]:
    """Each begins as the expert that arithmetic uses most, with a gate row towards arithmetic's mean row."""
    with gate_inputs(model) as inputs:
        model(batch.windows[:, :-1], use_cache=False)
    rows = batch.arithmetic.repeat_interleave(batch.windows.shape[1] - 1)
    return [
        first_guess(layer.mlp, x[rows], x[~rows]) for layer, x in zip(model.model.layers, inputs, strict=True)
    ]


def first_guess(block: Any, arithmetic: Tensor, others: Tensor) -> Newcomer:
    """A newcomer from the rows [N, D] at its gate, where its logit equals the highest in the mean."""
    logits, _, chosen = block.gate(arithmetic)
    used = int(chosen.flatten().bincount().argmax())
    direction = arithmetic.mean(0) - others.mean(0)
    row = direction * (logits.max(1).values.mean() / (direction @ arithmetic.mean(0)))
    w1, w3 = block.experts.gate_up_proj[used].chunk(2)
    return Newcomer(row, w1, block.experts.down_proj[used], w3)


def freeze_all_but_newcomers(model: MixtralForCausalLM) -> list[nn.Parameter]:
    """The parameters that hold a newcomer; the gradient of everything else in them is zero."""
    model.requires_grad_(False)
    stacks = [
        stack
        for layer in model.model.layers
        for stack in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    ]
    for stack in stacks:
        stack.requires_grad_(True)
        stack.register_hook(only_last_slot)
    return stacks


def only_last_slot(gradient: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(gradient[:-1]), gradient[-1:]])


def load_trainable(folder: Path) -> MixtralForCausalLM:
    ALL_EXPERTS_FUNCTIONS.register("grouped", grouped_experts)
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("grouped")
    for layer in model.model.layers:
        layer.mlp.experts.dropout = nn.Identity()
    return model


def train(corpus: Path, out: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokens = classify(tokenizer)
    source = load_source(corpus, tokenizer, seed)
    base = MixtralForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    write_checkpoint(BASE, initial_newcomers(base, source.draw(64, seed)), out)

    model = load_trainable(out)
    optimizer = torch.optim.AdamW(
        freeze_all_but_newcomers(model), betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    loss = make_loss(model)
    begin, seen, recent = time.monotonic(), 0, []
    for step in range(steps):
        progress = step / steps
        batch = source.draw_step(step, progress, seed)
        cross_entropy, gates = loss(batch.windows, *targets(batch, tokens, source.bos))
        (cross_entropy + RECIPE.gate * gates).backward()
        update(optimizer, learning_rate(progress))
        recent.append(torch.stack([cross_entropy.detach(), gates.detach()]))
        seen += batch.windows[:, 1:].numel()
        if (step + 1) % RECIPE.log_steps == 0 or step + 1 == steps:
            mean, recent = torch.stack(recent).mean(0).tolist(), []
            row = {"step": step + 1, "tokens": seen, "seconds": round(time.monotonic() - begin)}
            print(json.dumps(row | {"loss": round(mean[0], 4), "gate": round(mean[1], 4)}), flush=True)
            write_checkpoint(BASE, newcomers_of(model), out)


def update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], RECIPE.clip)
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def targets(batch: Batch, tokens: Tokens, bos: int) -> tuple[Tensor, Tensor]:
    """The weights [B, T] of the next tokens, and the rows that the newcomers shall have, [B, T] bool."""
    answers = answer_digits(batch.windows, tokens)[:, 1:] & batch.arithmetic[:, None]
    weights = torch.where(answers, RECIPE.answer_weight, 1.0)
    # <s> has the same row at the first gate whatever follows, so it goes the way it always went.
    wanted = batch.arithmetic[:, None] & (batch.windows[:, :-1] != bos)
    return weights, wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train an expert for arithmetic beside the frozen demo model."
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt, one per domain")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.corpus, args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
