"""What the scheduler works with: a sequence as it sees one, and the chunk of it that a step runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's half of a request: how many tokens there are, how many are computed, which blocks are held."""

    sequence_id: str
    # Prompt and generated tokens; between them what a decoder is given, where an encoder reads the prompt.
    tokens: list[int]
    num_prompt_tokens: int
    # Shares the router and the cached prefixes with nobody but itself.
    tenant: str = ""
    # Every token's logits are wanted: nothing may be taken from the prefix cache.
    reads_all: bool = False
    # Leading tokens whose keys and values are in the cache.
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    # The generated tokens alone.
    output: list[int] = field(default_factory=list)
    # Names of its leading full blocks, as far as anybody asked (see prefix_cache.py).
    names: list[bytes] = field(default_factory=list)
    # The slot of its recurrent state while it runs, where the model has one (see state_cache.py).
    state: int | None = None
    # How many tokens are computed, multiples of a block, when that state is worth a copy: chunks end there.
    marks: tuple[int, ...] = ()

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.output.append(token_id)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: [start, start + num_tokens)."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def reaches_end(self) -> bool:
        """Whether the chunk's last row predicts a new token."""
        return self.end == len(self.sequence.tokens)
