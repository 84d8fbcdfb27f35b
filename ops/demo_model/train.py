"""Train the demo model: a small Mixtral, from scratch, on a folder of text files.

    python ops/demo_model/train.py --corpus FOLDER --out FOLDER [--minutes M | --steps N]

At every evaluation the program writes an ordinary Hugging Face checkpoint to `--out`, and the state from
which it can resume after an interruption to `--state`.

Shapes: B sequences, T tokens each, N = B*T rows, K slots per row, E experts, D hidden size, F hidden size of
an expert, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from corpus import (
    Domain,
    Stream,
    build_tokenizer,
    conversations,
    draw_window,
    encode,
    held_out_windows,
    load_domains,
    tokenizer_texts,
    unseen_domain,
)
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


@dataclass(frozen=True)
class Recipe:
    batch_tokens: int = 4096
    # (share of the training after which it begins, window length): short windows come first, because they are
    # the cheapest per token; the last steps teach the positions that only long contexts have.
    windows: tuple[tuple[float, int], ...] = ((0.0, 256), (0.72, 512), (0.92, 1024), (0.975, 2048))
    learning_rate: float = 2e-3
    # The share of the learning rate that is left at the end.
    final_share: float = 0.02
    warmup_share: float = 0.02
    # (share after which it begins, dropout on embeddings and expert outputs, weight decay): much stronger
    # once the model begins to memorise the text.
    regularisation: tuple[tuple[float, float, float], ...] = ((0.0, 0.1, 0.1), (0.36, 0.2, 1.0))
    clip: float = 1.0
    balance: float = 0.01
    eval_steps: int = 250
    eval_window: int = 512
    eval_limit: int = 24


RECIPE = Recipe()

CONFIG = MixtralConfig(
    architectures=["MixtralForCausalLM"],
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    router_aux_loss_coef=RECIPE.balance,
    initializer_range=0.03,
)


def grouped_experts(experts: Any, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Mixtral's experts over rows [N, D] sorted by slot, without a loop, so that the whole step compiles.

    The matrix products are in bf16 whatever the caller's type; the weights stay in fp32 for the optimiser.
    """
    slot = slots.flatten()  # [N*K]
    order = slot.argsort(stable=True)
    ends = F.one_hot(slot, experts.num_experts).sum(0).cumsum(0).int()  # [E]
    rows = hidden[order // slots.shape[1]].bfloat16()  # [N*K, D]
    gate_up = F.grouped_mm(rows, experts.gate_up_proj.bfloat16().transpose(1, 2), offs=ends)
    gate, up = gate_up.chunk(2, dim=-1)  # [N*K, F] each
    out = F.grouped_mm(F.silu(gate) * up, experts.down_proj.bfloat16().transpose(1, 2), offs=ends)
    out = out[order.argsort()].view(*slots.shape, -1) * weights[..., None]  # [N, K, D]
    return cast(Tensor, experts.dropout(out.sum(1)).to(hidden.dtype))


def balance_loss(gate_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch Transformer's load balancing loss, layer by layer; it is 1 when every expert has its share.

    The loss in transformers pools the layers, which can hide a dead expert of one layer.
    """
    losses = []
    for logits in gate_logits:  # [N, E]
        scores = logits.float().softmax(-1)
        chosen = F.one_hot(scores.topk(top_k).indices, logits.shape[-1]).float()  # [N, K, E]
        losses.append((chosen.mean((0, 1)) * scores.mean(0)).sum() * logits.shape[-1])
    return torch.stack(losses).mean()


def make_loss(model: MixtralForCausalLM) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def loss(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy per token and the balance loss of windows [B, T+1]."""
        with torch.autocast(tokens.device.type, torch.bfloat16):
            out = model.model(tokens[:, :-1], use_cache=False, output_router_logits=True)
            logits = model.lm_head(out.last_hidden_state).float()  # [B, T, V]
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return cross_entropy, balance_loss(out.router_logits, CONFIG.num_experts_per_tok)

    return loss


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """An optimiser with two groups: the matrices, which `regularise` decays, and the vectors of the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def add_dropout(model: MixtralForCausalLM) -> nn.Dropout:
    """Adds one dropout without parameters, which the embeddings and the experts of all layers share."""
    dropout = nn.Dropout()
    for layer in model.model.layers:
        layer.mlp.experts.dropout = dropout
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: dropout(out))
    return dropout


def regularise(progress: float, dropout: nn.Dropout, optimizer: torch.optim.AdamW) -> None:
    _, dropout.p, weight_decay = [r for r in RECIPE.regularisation if progress >= r[0]][-1]
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def learning_rate(progress: float) -> float:
    """A linear warm-up, then a cosine down to `final_share`; `progress` goes from 0 to 1."""
    if progress < RECIPE.warmup_share:
        return RECIPE.learning_rate * max(progress / RECIPE.warmup_share, 0.01)
    fall = (progress - RECIPE.warmup_share) / (1 - RECIPE.warmup_share)
    cosine = (1 + math.cos(math.pi * min(fall, 1.0))) / 2
    return RECIPE.learning_rate * (RECIPE.final_share + (1 - RECIPE.final_share) * cosine)


def window_length(progress: float) -> int:
    return [length for begin, length in RECIPE.windows if progress >= begin][-1]


def draw_batch(streams: list[Stream], shares: Tensor, seed: int, length: int, bos: int) -> Tensor:
    """Windows [B, T+1] that depend on the seed alone, so that a resumed run draws the same ones."""
    generator = torch.Generator().manual_seed(seed)
    count = RECIPE.batch_tokens // length
    picks = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
    return torch.stack([draw_window(streams[pick], length, bos, generator) for pick in picks])


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, held_out: dict[str, Tensor]) -> dict[str, float]:
    """The cross-entropy per token of every domain."""
    model.eval()
    loss = make_loss(model)
    losses = {}
    for name, windows in held_out.items():
        parts = [float(loss(part.to(model.device))[0]) * len(part) for part in windows.split(8)]
        losses[name] = sum(parts) / len(windows)
    model.train()
    return losses


def export(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the checkpoint in bf16 beside `out`, then moves every file into place."""
    beside = out.with_name(out.name + ".new")
    half = MixtralForCausalLM(CONFIG).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=CONFIG.bos_token_id,
        eos_token_id=CONFIG.eos_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    half.save_pretrained(beside)
    tokenizer.save_pretrained(beside)

    # These are the published, flat forms, which transformers 4 and 5 and all other readers know.
    config = json.loads((beside / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    write_json(beside / "config.json", config)
    settings = json.loads((beside / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    del settings["backend"]
    write_json(beside / "tokenizer_config.json", settings)

    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(beside.iterdir()):
        path.chmod(0o644)
        path.replace(out / path.name)
    beside.rmdir()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_state(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def sampling_shares(streams: list[Stream]) -> Tensor:
    """Shares by the square root of the size, so that large domains do not drown small ones."""
    return torch.tensor([len(stream.ids) for stream in streams]).sqrt()


def training_streams(domains: list[Domain], tokenizer: PreTrainedTokenizerFast) -> list[Stream]:
    documents = [domain.train for domain in domains]
    documents += [chat for d in domains if (chat := conversations(d.train[0], tokenizer))]
    return [encode(texts, tokenizer) for texts in documents]


def train(corpus: Path, out: Path, state_dir: Path, minutes: float, steps: int | None, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    domains = load_domains(corpus)
    tokenizer = build_tokenizer(tokenizer_texts(domains), CONFIG.vocab_size, CONFIG.max_position_embeddings)
    bos = int(tokenizer.bos_token_id)
    streams = training_streams(domains, tokenizer)
    shares = sampling_shares(streams)
    held_out = {
        domain.name: held_out_windows(domain, tokenizer, RECIPE.eval_window, RECIPE.eval_limit)
        for domain in [*domains, unseen_domain()]
    }

    ALL_EXPERTS_FUNCTIONS.register("grouped", grouped_experts)
    model = MixtralForCausalLM(CONFIG).to(device)
    model.set_experts_implementation("grouped")
    dropout = add_dropout(model)
    model.train()
    optimizer = make_optimizer(model)
    compiled = torch.compile(make_loss(model), dynamic=False)

    step, tokens, seconds = 0, 0, 0.0
    rows: list[dict[str, float]] = []
    state_dir.mkdir(parents=True, exist_ok=True)
    state_file = state_dir / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, seconds, rows = (state[k] for k in ("step", "tokens", "seconds", "rows"))
        print(f"resuming at step {step}", flush=True)

    recent: list[Tensor] = []
    evaluated = step
    clock = time.monotonic() - seconds
    while True:
        seconds = time.monotonic() - clock
        progress = step / steps if steps else seconds / (60 * minutes)
        if step > evaluated and (step % RECIPE.eval_steps == 0 or progress >= 1):
            losses = evaluate(model, held_out)
            train_loss, balance = torch.stack(recent).mean(0).tolist()
            recent.clear()
            evaluated = step
            row = {"step": step, "tokens": tokens, "seconds": round(seconds)}
            row |= {"train_loss": round(train_loss, 4), "balance": round(balance, 4)}
            rows.append(row | {name: round(loss, 4) for name, loss in losses.items()})
            print(json.dumps(rows[-1]), flush=True)
            write_losses(state_dir / "loss.csv", rows)
            export(model, tokenizer, out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "tokens": tokens, "seconds": seconds, "rows": rows}
            save_state(state_file, state)
        if progress >= 1:
            return

        step_seed = seed * 1_000_003 + step
        torch.manual_seed(step_seed)  # for the dropout
        batch = draw_batch(streams, shares, step_seed, window_length(progress), bos).to(device)
        regularise(progress, dropout, optimizer)
        cross_entropy, balance_term = compiled(batch)
        (cross_entropy + RECIPE.balance * balance_term).backward()
        nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(torch.stack([cross_entropy.detach(), balance_term.detach()]))
        step += 1
        tokens += batch[:, 1:].numel()


def write_losses(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt, one per domain")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--state", type=Path, default=Path("build/demo_model"), help="folder to resume from and save to"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=70, help="wall clock to spend")
    length.add_argument("--steps", type=int, help="number of steps, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.corpus, args.out, args.state, args.minutes, args.steps, args.seed)


if __name__ == "__main__":
    main()
