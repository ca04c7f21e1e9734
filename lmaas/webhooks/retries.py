"""The times at which a failed attempt is repeated. Pure."""

#: The pauses before the attempts after the first one: about three days in all.
PAUSES_S = (5.0, 60.0, 5 * 60.0, 30 * 60.0, 2 * 3600.0, 5 * 3600.0, 10 * 3600.0, 14 * 3600.0, 20 * 3600.0, 20 * 3600.0)
#: A pause is longer by at most this part, so that what failed together does not return together.
JITTER = 0.1
#: The longest pause that a target's `Retry-After` may request.
MAX_RETRY_AFTER_S = 24 * 3600.0


def retry_in_s(failures: int, retry_after_s: float | None, chance: float) -> float | None:
    """Return the pause after an attempt that failed, None if it was the last one.

    `failures` are the attempts that failed before it, `chance` a random number from 0 to 1.
    """
    if failures >= len(PAUSES_S):
        return None
    pause_s = PAUSES_S[failures] * (1 + JITTER * chance)
    return max(pause_s, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))
