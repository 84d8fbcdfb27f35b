"""`moesaic inspect`: the content of a model folder, its memory, and whether it can be served.

Reads no weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.checkpoints.inspection import Inspection, StoredTensors, inspect_folder
from cluster.checkpoints.memory_fit import Memory, MemoryFit
from cluster.checkpoints.model_facts import HELD, LayerKind, ModelFacts
from cluster.checkpoints.model_source import DEMO_MODEL, find_model
from cluster.terminal.tables import amount, count, files, new_table, size
from moesaic.machine_memory import read_memory
from moesaic.settings import Settings

# The exit code for a folder that cannot be served, the same as that of `moesaic serve`.
WILL_NOT_SERVE = 2

_FIT_WORDS = {"fits": "fits", "tight": "tight", "no": "does not fit"}
_DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8"}


def run_inspect(model: str | None, settings: Settings, *, as_json: bool) -> None:
    """Prints a folder's facts. Raises CheckpointError without one, typer.Exit if it cannot be served."""
    memory = Memory(*read_memory())
    inspection = inspect_folder(find_model(model or str(DEMO_MODEL)), settings, memory)
    if as_json:
        print(json.dumps({"serves": inspection.serves, **asdict(inspection)}))
    else:
        print_inspection(inspection, Console(file=sys.stdout, highlight=False))
    if not inspection.serves:
        raise typer.Exit(WILL_NOT_SERVE)


def print_inspection(inspection: Inspection, out: Console) -> None:
    """Prints the inspection as text and tables."""
    out.print(_outline(inspection))
    if inspection.model is None:
        return
    tables = [_layer_table(inspection.model.layers), _memory_table(inspection.model, inspection.memory)]
    for table in tables:
        out.print()
        out.print(table)


def _outline(inspection: Inspection) -> Table:
    """Names in the left column, values in the right one."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _lines(inspection):
        table.add_row(name, value)
    return table


def _lines(inspection: Inspection) -> Iterator[tuple[str, Text]]:
    yield "model", Text(inspection.folder, "bold")
    if inspection.problem is None:
        yield "will serve", Text("yes", "green")
    else:
        yield "will serve", Text.assemble(("no", "red"), f": {inspection.problem.message}")
    yield "family", Text(inspection.family or "not known")
    yield "layout", Text(inspection.layout or "not known")
    if inspection.stored is not None:
        yield "files", Text(_files(inspection.stored, inspection.model))
    if inspection.model is not None:
        yield from _model_lines(inspection.model)
    if inspection.memory is not None:
        yield "memory", Text(inspection.memory.sentence)
    yield "tokenizer", Text(inspection.tokenizer or "none: prompts are token ids")
    yield "chat template", Text(inspection.chat_template or "none")


def _files(stored: StoredTensors, model: ModelFacts | None) -> str:
    dtypes = ", ".join(f"{_DTYPE_WORDS.get(name, name)} {size(held)}" for name, held in stored.bytes.items())
    if model is None or not model.experts:
        return f"{files(stored.files)}: {dtypes}"
    parts = f"experts {size(model.expert_file_bytes)}, router {size(model.router_file_bytes)}"
    return f"{files(stored.files)}: {dtypes}; {parts}"


def _model_lines(model: ModelFacts) -> Iterator[tuple[str, Text]]:
    all_active = model.active_parameters == model.parameters
    met = "all" if all_active else amount(model.active_parameters)
    yield "parameters", Text(f"{amount(model.parameters)}, of which a token meets {met}")
    if model.untied:
        names = ", ".join(model.untied)
        yield (
            "not tied",
            Text(f"{names}: differs from what the config ties it to; the tensor in the files counts"),
        )
    yield "context", Text(f"{count(model.context_length)} tokens, vocabulary of {count(model.vocab_size)}")


def _layer_table(layers: Sequence[LayerKind]) -> Table:
    table = new_table("layers", "mixer", "experts", ">an expert")
    for column in table.columns[:-1]:
        column.no_wrap = False
    for kind in layers:
        table.add_row(
            _ranges(kind.layers), kind.mixer, _experts(kind), amount(kind.parameters) if kind.experts else ""
        )
    return table


def _experts(kind: LayerKind) -> str:
    if not kind.gated:
        return "dense, one expert" if kind.experts else "dense, in the router"
    shared = f", {amount(kind.shared_parameters)} shared" if kind.shared_parameters else ""
    return f"{kind.experts}, {kind.top_k} a token{shared}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, abbreviated: `0-3, 5`; `0-34/2` is every second number from 0 to 34."""
    step = numbers[1] - numbers[0] if len(numbers) > 2 else 1
    if step > 1 and all(later - earlier == step for earlier, later in pairwise(numbers)):
        return f"{numbers[0]}-{numbers[-1]}/{step}"
    breaks = [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1] + 1]
    runs = [numbers[first:end] for first, end in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _memory_table(model: ModelFacts, memory: MemoryFit | None) -> Table:
    table = new_table("weights in memory", ">experts", *(f">{held}" for held in HELD))
    table.add_row("router", "", *(_size(model.router_bytes.get(held)) for held in HELD))
    for held_by in model.worker_memory:
        name = "a single worker" if held_by.workers == 1 else f"each of {held_by.workers} workers"
        table.add_row(name, count(held_by.experts), *(_size(held_by.bytes.get(held)) for held in HELD))
    if memory is not None:
        table.add_row("router and experts", "", *(_size(memory.bytes.get(held)) for held in HELD))
        table.add_row(
            "on this machine", "", *(_FIT_WORDS.get(memory.fits.get(held, ""), "") for held in HELD)
        )
    return table


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else size(num_bytes)
