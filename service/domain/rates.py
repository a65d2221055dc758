"""How often somebody may do something: a bucket of tokens for each name, kept as one number; pure.

The number is the time at which the bucket will be full again (the generic cell rate algorithm).
"""

MOST_NAMES = 10_000
"""Buckets that are kept before the full ones, which say nothing, are thrown away."""


class RateLimit:
    """Lets each name do `burst` things at once, and `per_second` in the long run."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._interval, self._span = 1 / per_second, burst / per_second
        self._full_at: dict[str, float] = {}

    def take(self, name: str, now: float) -> float:
        """Do one thing at time `now` in seconds; return 0, or how many seconds it comes too early, and then it does not count."""
        full_at = max(self._full_at.get(name, now), now) + self._interval
        if (early := full_at - now - self._span) > 1e-9:
            return early
        if len(self._full_at) >= MOST_NAMES:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = full_at
        return 0.0
