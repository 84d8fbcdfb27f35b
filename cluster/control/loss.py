"""Which workers are lost: the decision, apart from the questions. Pure, over times that its caller names.

Evidence of death counts at once. Silence is no evidence: it may be the controller's own. A silent worker is
lost only when it has left several questions in turn unanswered, while the controller itself was awake, and
while at least as many other workers were heard as were not.
"""

from __future__ import annotations

# How many questions in turn a worker must leave unanswered.
MIN_MISSES = 2
# How often the controller's loop says that it is awake, and how late it may be with that.
BEAT_S = 0.25
MAX_LAG_S = 1.0


class Losses:
    """What the controller has heard of each worker. Times are seconds on one monotonic clock."""

    def __init__(self, workers: frozenset[str]) -> None:
        self._workers = workers
        self._heard_s: dict[str, float] = {}
        # For each worker that is silent: when it began to be, and how many questions it has not answered.
        self._silent_since_s: dict[str, float] = {}
        self._misses: dict[str, int] = {}
        self._dead: set[str] = set()
        self._beat_s: float | None = None
        self._awake_since_s = float("-inf")

    def beat(self, now_s: float) -> None:
        """The controller's loop runs. It says so every BEAT_S; a longer pause makes earlier questions stale."""
        if self._beat_s is not None and now_s - self._beat_s > BEAT_S + MAX_LAG_S:
            self._awake_since_s = now_s
        self._beat_s = now_s

    def hear(self, name: str, now_s: float) -> None:
        """The process answered."""
        self._heard_s[name] = now_s
        self._silent_since_s.pop(name, None)
        self._misses.pop(name, None)
        self._dead.discard(name)

    def die(self, name: str) -> None:
        """There is evidence that the process is gone, or cannot serve any more."""
        self._dead.add(name)

    def miss(self, name: str, asked_s: float, now_s: float) -> bool:
        """A question, asked at `asked_s`, was not answered. Returns whether the process counts as lost."""
        self.beat(now_s)
        if name in self._dead:
            return True
        if asked_s < self._awake_since_s:  # the controller slept: the answer may lie unread
            return False
        self._silent_since_s.setdefault(name, now_s)
        self._misses[name] = self._misses.get(name, 0) + 1
        return self._misses[name] >= MIN_MISSES and not self.is_deaf(self._silent_since_s[name])

    def is_deaf(self, since_s: float) -> bool:
        """Whether more workers are silent than were heard after `since_s`, so that the fault may be here.

        A worker that is known to be dead counts as neither.
        """
        alive = self._workers - self._dead
        heard = sum(self._heard_s.get(name, float("-inf")) > since_s for name in alive)
        return heard < len(alive) - heard
