"""What the clients of a drill got, compared with what they should have got. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.bench.latency import RequestRecord

# By the id of an epoch: of every prompt, the tokens of its answer in that epoch.
References = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request of the load.

    `refused`: how often the server asked the client to come back before it let the request in.
    """

    # Its place among the prompts of the drill.
    prompt: int
    record: RequestRecord
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests counted: what was lost, and what was wrong.

    `lost`: no whole answer. `wrong_tokens`: another token at its place than the reference's of the answer's epoch, or
    one too many, in lost requests too. `mixed`: answers that name more than one epoch, or none.
    """

    requests: int
    lost: int
    wrong_tokens: int
    mixed: int
    refused: int
    # How many requests failed with each error.
    errors: dict[str, int]

    @classmethod
    def of(cls, answers: Iterable[Answer], references: References) -> Tally:
        answers = list(answers)
        records = [answer.record for answer in answers]
        return cls(
            requests=len(records),
            lost=sum(bool(record.error) for record in records),
            wrong_tokens=sum(wrong_tokens_of(answer, references) for answer in answers),
            mixed=sum(is_mixed(record) for record in records),
            refused=sum(answer.refused for answer in answers),
            errors=dict(Counter(record.error for record in records if record.error)),
        )


def wrong_tokens_of(answer: Answer, references: References) -> int:
    """Tokens that no single epoch explains of those that the answer names; all of them where it names none that is
    known."""
    known = [references[epoch][answer.prompt] for epoch in answer.record.epochs if epoch in references]
    return min(wrong_tokens(answer.record.token_ids, expected) for expected in known or [()])


def wrong_tokens(got: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens that are not the expected one at their place. An answer that ends early has no wrong token for it."""
    differing = sum(one != other for one, other in zip(got, expected, strict=False))
    return differing + max(0, len(got) - len(expected))


def is_mixed(record: RequestRecord) -> bool:
    """An answer that has tokens names exactly one epoch."""
    return bool(record.token_ids) and len(record.epochs) != 1
