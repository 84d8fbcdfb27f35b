"""The words with which a call says which experts may compute it: `experts=Deny("maths-v1") | Require("law-v2")`."""

from __future__ import annotations

from moesaic.expert_policy import ExpertPolicy


def Deny(*entries: str) -> ExpertPolicy:
    """None of these experts computes the request. An entry is the name of a bundle, a tag, or LAYER:SLOT."""
    return ExpertPolicy(deny=entries)


def Allow(*entries: str) -> ExpertPolicy:
    """Of the experts that bundles added, only these compute the request, beside the model's own."""
    return ExpertPolicy(allow=entries)


def Require(*entries: str) -> ExpertPolicy:
    """The request fails unless all of these are part of the epoch that computes it."""
    return ExpertPolicy(require=entries)
