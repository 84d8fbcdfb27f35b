"""What the scheduler works with: its view of a sequence, and the chunk of one that a step runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's half of a request: its tokens, how many of them are computed, which blocks it holds."""

    sequence_id: str
    # The prompt, the decoder's own prompt where an encoder reads the first, and the generated tokens.
    tokens: list[int]
    num_prompt_tokens: int
    # The key of the view of the model that computes it. Prefixes are shared by view, too.
    view: str = ""
    # Whom it is computed for. Prefixes are shared, and served tokens counted, by tenant.
    tenant: str = ""
    # The request that it answers, alone or with others. Places are shared between calls; empty: a call of its own.
    call: str = ""
    # Whether the logits of every token are wanted, so that nothing may be taken from the prefix cache.
    reads_all: bool = False
    # Whether its values are not those of the whole model, so that nobody else may have them.
    private: bool = False
    # The number of leading tokens whose keys and values are in the cache.
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    # The generated tokens alone.
    output: list[int] = field(default_factory=list)
    # The hashes of its leading full blocks, as far as they have been needed (see prefix_cache.py).
    block_hashes: list[bytes] = field(default_factory=list)
    # The slot of its recurrent state while it runs, where the model has one (see state_pool.py).
    state: int | None = None
    # Numbers of computed tokens, multiples of a block, at which chunks end and that state is copied.
    snapshot_points: tuple[int, ...] = ()

    @property
    def owner(self) -> tuple[str, str]:
        """Who holds its place while it runs: a call of a tenant."""
        return self.tenant, self.call or self.sequence_id

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
