"""A router under load in virtual time: its own scheduler, prefill budget and admission over a machine with fixed prices.

Clients come at random times and do not wait for one another (an open loop). Whatever a step computes for an answer that
does not end in time is wasted.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from moesaic.errors import Overloaded
from router.scheduling.admission import Admission, AdmissionLimits, Cost
from router.scheduling.block_pool import BlockPool
from router.scheduling.pace import PaceMeter
from router.scheduling.prefill_budget import PrefillBudget
from router.scheduling.scheduler import Limits, Scheduler, count
from router.scheduling.sequence import Chunk, Sequence

MAX_RUNNING, MAX_WAITING, MAX_BATCH_TOKENS = 16, 64, 256
# The prices of a step: that of its own, of a sequence that decodes, of a prompt's token.
STEP_S, DECODE_S, PROMPT_S = 0.01, 0.001, 0.0002


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients ask for. `allowed_tokens` is what they allow, `answer_tokens` the mean of what their answers need."""

    deadline_s: float
    prompt_tokens: int = 60
    answer_tokens: int = 40
    allowed_tokens: int = 400


@dataclass(slots=True)
class Client:
    """A request and the length that its answer will have."""

    sequence: Sequence
    deadline_s: float
    answer_tokens: int
    allowed_tokens: int
    started: bool = False
    computed: int = 0


@dataclass
class Outcome:
    """How the requests ended, each once, and the tokens that were computed for them."""

    ended: dict[str, str] = field(default_factory=dict)
    good_tokens: int = 0
    computed_tokens: int = 0
    wasted_tokens: int = 0
    most_waiting: int = 0
    retry_after_s: list[float] = field(default_factory=list)

    @property
    def ends(self) -> Counter[str]:
        return Counter(self.ended.values())

    @property
    def wasted_share(self) -> float:
        return self.wasted_tokens / max(1, self.computed_tokens)


class Router:
    """One router in virtual time."""

    def __init__(self, seed: int, demand: Demand) -> None:
        self.now_s = 0.0
        self.outcome = Outcome()
        self._random = random.Random(seed)
        self._demand = demand
        budget = PrefillBudget(max_batch_tokens=MAX_BATCH_TOKENS, max_stall=1.8)
        self._scheduler = Scheduler(
            Limits(MAX_BATCH_TOKENS, MAX_RUNNING), BlockPool(4096, 16), prefill_budget=budget
        )
        self._admission = Admission(AdmissionLimits(MAX_RUNNING, MAX_WAITING), PaceMeter(budget))
        self._clients: dict[str, Client] = {}
        self._num_sent = 0

    def serve(self, rate: float, seconds: float) -> Outcome:
        """Lets requests arrive at this rate for so long, and works until all have ended. Its tokens count from zero."""
        self.outcome = Outcome()
        begin_s = self.now_s
        arrivals = deque(self._arrivals(begin_s, rate, seconds))
        while arrivals or self._clients:
            if not self._clients:
                self.now_s = max(self.now_s, arrivals[0])
            while arrivals and arrivals[0] <= self.now_s:
                self._arrive(arrivals.popleft())
            self._expire()
            self._step(begin_s + seconds)
        return self.outcome

    def _arrivals(self, begin_s: float, rate: float, seconds: float) -> list[float]:
        times, when_s = [], begin_s
        while (when_s := when_s + self._random.expovariate(rate)) < begin_s + seconds:
            times.append(when_s)
        return times

    def _arrive(self, when_s: float) -> None:
        self._num_sent += 1
        demand, name = self._demand, str(self._num_sent)
        num_prompt = self._random.randint(1, 2 * demand.prompt_tokens - 1)
        deadline_s = when_s + demand.deadline_s
        cost = Cost(num_prompt, demand.allowed_tokens)
        try:
            self._admission.admit(name, cost, deadline_s - self.now_s)
        except Overloaded as error:
            self._record(name, error.reason)
            self.outcome.retry_after_s.append(error.retry_after_s or 0.0)
            return
        sequence = Sequence(name, [0] * num_prompt, num_prompt)
        length = min(demand.allowed_tokens, self._random.randint(1, 2 * demand.answer_tokens - 1))
        self._clients[name] = Client(sequence, deadline_s, length, demand.allowed_tokens)
        self._scheduler.add(sequence)

    def _expire(self) -> None:
        for name, client in list(self._clients.items()):
            if client.deadline_s <= self.now_s:
                self._admission.note_answer(len(client.sequence.output), is_whole=False)
                self._end(name, "too late")
            elif not client.started and (error := self._admission.shed(name, client.deadline_s - self.now_s)):
                self._end(name, f"shed {error.reason}")

    def _step(self, counted_until_s: float) -> None:
        chunks = self._scheduler.schedule()
        self.outcome.most_waiting = max(self.outcome.most_waiting, len(self._scheduler.waiting))
        if not chunks:
            return
        num_decoding, num_prompt_tokens = count(chunks)
        exact_s = STEP_S + DECODE_S * num_decoding + PROMPT_S * num_prompt_tokens
        seconds = exact_s * self._random.uniform(0.9, 1.1)
        self.now_s += seconds
        for chunk in chunks:
            self._complete(chunk, is_counted=self.now_s <= counted_until_s)
        self._scheduler.observe(chunks, seconds)
        self._admission.note_step(num_decoding, seconds)

    def _complete(self, chunk: Chunk, *, is_counted: bool) -> None:
        sequence = chunk.sequence
        client = self._clients[sequence.sequence_id]
        client.started = True
        client.computed += chunk.num_tokens
        self._scheduler.advance(chunk)
        if not chunk.reaches_end:
            return
        if not sequence.output:
            self._admission.note_read(sequence.sequence_id)
        sequence.append(0)
        if len(sequence.output) == client.answer_tokens:
            self._admission.note_answer(client.answer_tokens)
            in_time = client.deadline_s >= self.now_s
            if in_time and is_counted:
                self.outcome.good_tokens += client.answer_tokens
            self._end(sequence.sequence_id, "answered" if in_time else "too late")

    def _end(self, name: str, how: str) -> None:
        client = self._clients.pop(name)
        self._scheduler.remove(client.sequence)
        self._admission.end(name)
        self.outcome.computed_tokens += client.computed
        self.outcome.wasted_tokens += 0 if how == "answered" else client.computed
        self._record(name, how)

    def _record(self, name: str, how: str) -> None:
        assert name not in self.outcome.ended, "a request ended twice"
        self.outcome.ended[name] = how

    def check_empty(self) -> None:
        """What holds when everybody has gone."""
        assert not self._admission.backlog.sequences
        assert not self._admission.backlog.prompt_tokens and not self._admission.backlog.output_tokens
        self._scheduler.check_integrity()
