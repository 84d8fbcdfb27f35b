"""Measure the demo model and checkpoints that add an expert to it: perplexity per domain, and sums got right.

    python ops/demo_model/evaluate_expert.py FOLDER [FOLDER ...] --corpus FOLDER [--report FILE]

The first folder is the base, the others have one more expert per layer. A sum counts as right when greedy
decoding ends the line with its answer and nothing else. Prints tables in Markdown; with --report the figures
and every answer are also written as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from corpus import Domain, held_out_windows, load_domains, unseen_domain
from evaluate import WINDOW, WINDOWS, measure_domain, table
from sums import Sum, held_out_sums
from transformers import AutoModelForCausalLM, AutoTokenizer

# A space, three digits at the most, and the end of the line.
ANSWER_TOKENS = 5


def greedy_answers(model: Any, tokenizer: Any, questions: list[str]) -> dict[str, str]:
    """The first line that follows each question; questions of one length are decoded together."""
    by_length = defaultdict(list)
    for question in questions:
        by_length[len(tokenizer(question)["input_ids"])].append(question)
    answers = {}
    for length, group in by_length.items():
        inputs = tokenizer(group, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=1)
        for question, row in zip(group, out, strict=True):
            text = tokenizer.decode(row[length:], skip_special_tokens=True)
            answers[question] = text.split("\n")[0].strip()
    return answers


def measure_sums(model: Any, tokenizer: Any, sums: list[Sum]) -> dict[str, Any]:
    answers = greedy_answers(model, tokenizer, [s.question for s in sums])
    right = [s.question for s in sums if answers[s.question] == s.answer]
    return {
        "asked": len(sums),
        "right": len(right),
        "share": round(len(right) / len(sums), 3),
        "answers": answers,
    }


def last_slot_share(counts: list[list[int]]) -> list[float]:
    """For each layer, the share of tokens that choose its last slot, when each token chooses two."""
    return [round(2 * layer[-1] / sum(layer), 4) for layer in counts]


@torch.no_grad()
def measure(folder: Path, domains: list[Domain]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = {
        d.name: measure_domain(model, tokenizer, held_out_windows(d, tokenizer, WINDOW, WINDOWS))
        for d in domains
    }
    for figures in held_out.values():
        figures["last_slot_share"] = last_slot_share(figures.pop("expert_assignments"))
    return {"held_out": held_out, "sums": measure_sums(model, tokenizer, held_out_sums())}


def print_tables(report: dict[str, Any]) -> None:
    domains = list(next(iter(report.values()))["held_out"])
    rows = [
        [name, *(str(r["held_out"][d]["perplexity"]) for d in domains), str(r["sums"]["right"])]
        for name, r in report.items()
    ]
    asked = next(iter(report.values()))["sums"]["asked"]
    print(table(["perplexity", *domains, f"sums right, of {asked}"], rows))
    shares = [
        [
            name,
            *(
                " ".join(f"{100 * share:.1f}" for share in r["held_out"][d]["last_slot_share"])
                for d in domains
            ),
        ]
        for name, r in report.items()
    ]
    print(table(["% of tokens in the last slot, by layer", *domains], shares))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model with and without newcomers.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    domains = [*load_domains(args.corpus), unseen_domain()]
    report = {folder.name: measure(folder, domains) for folder in args.folders}
    print_tables(report)
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
