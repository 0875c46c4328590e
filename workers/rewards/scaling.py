"""How many replicas a pool has: more while items queue up, fewer while some have nothing to do."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleRule:
    """When a pool grows or shrinks by one, in seconds."""

    backlog_seconds: float = 10.0  # of queued work for each replica: above it the pool grows ...
    patience_seconds: float = 5.0  # ... once it has been above for so long
    idle_seconds: float = 60.0  # a replica without a request for so long goes
    rest_seconds: float = 600.0  # from a replica that could not be started to the next try


class Autoscaler:
    """The size of one pool, between `smallest` and `largest`; equal ones fix it. Times are monotonic."""

    def __init__(self, rule: ScaleRule, smallest: int, largest: int) -> None:
        self._rule, self._smallest, self._largest = rule, smallest, largest
        self._queueing_since = math.inf
        self._rests_until = -math.inf

    def step(self, now: float, replicas: int, starting: bool, backlog_seconds: float, idle: float) -> int:
        """1, 0 or -1 replicas more. `replicas` counts those that are `starting`, too; `backlog_seconds` is
        the work that waits for each ready one; `idle` how long the idlest has had no request."""
        if backlog_seconds > self._rule.backlog_seconds:
            self._queueing_since = min(self._queueing_since, now)
        else:
            self._queueing_since = math.inf
        # One after the other: what the last one brings is seen before the next.
        if starting:
            return 0
        long_enough = now - self._queueing_since >= self._rule.patience_seconds
        if long_enough and replicas < self._largest and now >= self._rests_until:
            self._queueing_since = math.inf
            return 1
        return -1 if idle >= self._rule.idle_seconds and replicas > self._smallest else 0

    def rest(self, now: float) -> None:
        """Do not grow for a while: a replica could not be started."""
        self._rests_until = now + self._rule.rest_seconds
