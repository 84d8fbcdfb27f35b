"""The merges of a byte pair encoding, for files that list its pieces with scores instead."""

from __future__ import annotations

from collections.abc import Mapping


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, that of the highest score first. At equal scores, the
    longer first half comes first, then the longer second half."""
    pairs = [
        (left, right)
        for piece in scores
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    return sorted(pairs, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
