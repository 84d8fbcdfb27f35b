"""Measure a saved demo model: perplexity per domain, expert loads, long contexts, samples.

    python ops/demo_model/evaluate.py MODEL --corpus FOLDER [--report FOLDER]

Reads the checkpoint in the ordinary way (`from_pretrained`, fp32 arithmetic) and prints tables in Markdown.
With --report it also writes report.json to that folder and, where there is a loss.csv, loss.svg.

Shapes: N windows, B of them at a time, T tokens each, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import held_out_windows, load_domains, unseen_domain
from plot import Note, loss_curve
from torch import Tensor
from train import RECIPE
from transformers import AutoModelForCausalLM, AutoTokenizer

# The tokens of a held-out window, and the most windows of a domain.
WINDOW, WINDOWS = 512, 100
POSITIONS = ((0, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048))
PROMPTS = ("ROMEO:", "Once upon a time", "Fellow-citizens,", "def main(", "12 + 7 =")
CHAT = [{"role": "user", "content": "Good morrow, friend. What news from the city?"}]


@contextmanager
def counting_slots(model: Any) -> Iterator[list[Tensor]]:
    """For each layer, the number of assignments that each expert receives while the block runs."""
    counts = [torch.zeros(model.config.num_local_experts, dtype=torch.long) for _ in layers(model)]

    def count(layer: int) -> Any:
        def hook(gate: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            counts[layer] += output[2].flatten().bincount(minlength=len(counts[layer]))

        return hook

    hooks = [layer.mlp.gate.register_forward_hook(count(i)) for i, layer in enumerate(layers(model))]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def layers(model: Any) -> Any:
    return model.model.layers


def token_losses(model: Any, windows: Tensor) -> Tensor:
    """The cross-entropy of every token, [N, T], for windows [N, T+1]."""
    rows = []
    for part in windows.split(8):
        logits = model(part[:, :-1], use_cache=False).logits  # [B, T, V]
        rows.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(rows)


def measure_domain(model: Any, tokenizer: Any, windows: Tensor) -> dict[str, Any]:
    with counting_slots(model) as counts:
        losses = token_losses(model, windows)
    bytes_ = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in windows)
    return {
        "tokens": losses.numel(),
        "loss": round(losses.mean().item(), 4),
        "perplexity": round(losses.mean().exp().item(), 2),
        "bits_per_byte": round(losses.sum().item() / math.log(2) / bytes_, 3),
        "expert_assignments": [layer.tolist() for layer in counts],
    }


def loss_by_position(model: Any, windows: Tensor) -> dict[str, float]:
    losses = token_losses(model, windows)
    return {f"{a}-{b - 1}": round(losses[:, a:b].mean().item(), 4) for a, b in POSITIONS}


def sample(model: Any, tokenizer: Any, text: str, greedy: bool) -> str:
    """`text` and its continuation; the text already begins with <s>."""
    torch.manual_seed(0)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    output = model.generate(**inputs, max_new_tokens=96, **how)[0]
    return str(tokenizer.decode(output, skip_special_tokens=True))


@torch.no_grad()
def measure(folder: Path, corpus: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    domains = load_domains(corpus)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    texts = [*(tokenizer.bos_token + prompt for prompt in PROMPTS), chat]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "held_out": {
            domain.name: measure_domain(
                model, tokenizer, held_out_windows(domain, tokenizer, WINDOW, WINDOWS)
            )
            for domain in [*domains, unseen_domain()]
        },
        "loss_by_position": {
            domain.name: loss_by_position(
                model, held_out_windows(domain, tokenizer, POSITIONS[-1][1], WINDOWS // 4)
            )
            for domain in domains
        },
        "samples": [
            {"how": how, "text": sample(model, tokenizer, text, greedy=how == "greedy")}
            for text in texts
            for how in ("greedy", "sampled")
        ],
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def percentages(counts: list[int]) -> list[str]:
    return [f"{100 * count / sum(counts):.1f}" for count in counts]


def print_tables(report: dict[str, Any]) -> None:
    held_out = report["held_out"]
    keys = ("tokens", "loss", "perplexity", "bits_per_byte")
    print(table(["domain", *keys], [[n, *(str(d[k]) for k in keys)] for n, d in held_out.items()]))

    loads = {name: d["expert_assignments"] for name, d in held_out.items()}  # [layer][expert]
    experts = [f"e{i}" for i in range(len(loads["python"][0]))]
    rows = [
        [str(layer), name, *percentages(counts[layer])]
        for layer in range(len(loads["python"]))
        for name, counts in loads.items()
    ]
    print(table(["layer", "domain", *experts], rows))

    print(
        table(
            ["domain", *(f"{a}-{b - 1}" for a, b in POSITIONS)],
            [[name, *map(str, d.values())] for name, d in report["loss_by_position"].items()],
        )
    )
    for item in report["samples"]:
        print(f"**{item['how']}**\n```\n{item['text']}\n```\n")


def window_note() -> Note:
    """Why the loss falls at once: training reaches the length of the windows that are measured."""
    shorter = max(length for _, length in RECIPE.windows if length < RECIPE.eval_window)
    share = min(share for share, length in RECIPE.windows if length >= RECIPE.eval_window)
    return Note(
        share,
        (
            f"training windows of {RECIPE.eval_window} tokens from here on, {shorter} before;",
            f"the loss is measured in windows of {RECIPE.eval_window}",
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a saved demo model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="folder to write report.json and loss.svg to")
    args = parser.parse_args()
    report = measure(args.model, args.corpus)
    print_tables(report)
    if args.report:
        log = args.report / "loss.csv"
        if log.exists():
            with log.open(newline="") as file:
                rows = list(csv.DictReader(file))
            report["training"] = {name: float(value) for name, value in rows[-1].items()}
            (args.report / "loss.svg").write_text(loss_curve(rows, window_note()))
        (args.report / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
