"""Parameters that a config declares to be one tensor, such as the head and the embedding. The files decide, as they do for
transformers: a parameter that is stored with other values than the first of its kind is a tensor of its own, and if the
first is not stored, the next one that is takes its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from moesaic.checkpoints.checkpoint import Checkpoint
from moesaic.checkpoints.stored_values import have_same_values
from moesaic.families.model import MoeModel

Model = TypeVar("Model", bound=MoeModel)


def resolve_ties(checkpoint: Checkpoint, model: Model) -> Model:
    """The model without the tensors that are copies; `ties` keeps those, and `untied` has the tensors of their own.

    Two stored tensors are compared up to the first difference: the only values that a description ever reads.
    """
    if not model.ties:
        return model
    first, *others = model.ties
    entries = {
        name: checkpoint.tensors[model.dense[name].source]
        for name in model.ties
        if name in model.dense and model.dense[name].source in checkpoint.tensors
    }
    held = next(iter(entries), first)
    untied = tuple(
        name
        for name in others
        if name in entries and name != held and not have_same_values(entries[held], entries[name])
    )
    copies = {name for name in others if name not in untied}
    dense = {name: tensor for name, tensor in model.dense.items() if name not in copies}
    if held in entries:
        dense[first] = model.dense[held]
    return replace(
        model,
        dense=dense,
        ties=(first, *(name for name in others if name in copies)),
        untied=untied,
        ignored=model.ignored | {entries[name].name for name in copies & entries.keys() - {held}},
    )
