"""Decides how to treat a zygote that does not respond: wait for it, start without it, or replace it. Pure functions of its observed state.

A *plain* start imports vLLM three times, one after the other: in the server, in the engine core and in the worker. A zygote imports it
once. A zygote that makes progress, however slowly, is therefore ready sooner than a plain start that begins now and takes half of the
processor time. Only a zygote without progress is given up. The elapsed time alone never decides.
"""

from lmaas.engine.zygote.progress import Sight

#: A zygote that neither responds nor makes progress for this long has stalled.
STILL_S = 15.0
#: A zygote that uses this much processor time without answering or finishing a stage is in an endless loop. The limit is higher if imports
#: usually take long.
CIRCLES_S, CIRCLES_IMPORTS = 60.0, 3.0
#: The duration of a start, forked or plain, in seconds, until one of its base model has been seen.
FIRST_START_S = {"zygote": 3.0, "plain": 20.0}
#: The time for which a start continues to wait for a zygote that has stalled or ended. The owner needs some seconds to notice and to start
#: another.
REPLACED_S = 8.0


def stuck(seen: Sight, grace_s: float = 0.0) -> str:
    """Return the reason why a zygote that does not respond has to be replaced, or an empty string if it makes progress. `grace_s` extends
    the limits."""
    if seen.still_s > STILL_S + grace_s:
        return f"it has made no progress for {seen.still_s:.0f} s"
    if seen.stage_used_s > max(CIRCLES_S, CIRCLES_IMPORTS * seen.usual_s) + grace_s:
        return f"it has used {seen.stage_used_s:.0f} s of processor time without finishing a stage"
    return ""


def why_plain(seen: Sight) -> str:
    """Return the reason why a start no longer waits for the zygote, or an empty string if it continues to wait."""
    if seen.pid:
        # The owner, if there is one, replaces the zygote.
        reason = stuck(seen, 0.0 if seen.next_s is None else REPLACED_S)
        return reason and f"the zygote is stuck: {reason}"
    if seen.next_s is None:
        return "no zygote runs, and no process of this service starts one"
    if seen.next_s > max(REPLACED_S, seen.usual_s):
        return f"the zygote ended, and is started again in {seen.next_s:.0f} s at the earliest"
    if seen.absent_s > seen.next_s + REPLACED_S:
        return f"no zygote was started within {seen.absent_s:.0f} s"
    return ""


def import_left_s(seen: Sight) -> float:
    """Estimate the seconds until a zygote has imported everything, from the usual processor time of an import and the zygote's share of a
    processor.

    An import that has used more than the usual processor time is estimated to need the same excess again. A zygote that has not started
    needs the whole time.
    """
    if seen.serves:
        return 0.0
    left_s = max(min(1.0, seen.usual_s), seen.usual_s - seen.used_s, seen.used_s - seen.usual_s)
    return left_s / seen.share + seen.still_s + (seen.next_s or 0.0 if not seen.pid else 0.0)


def start_delay_s(seen: Sight) -> float:
    """Return the seconds by which engine starts are delayed at present, because they wait for a zygote that is importing. 0 if they do not
    wait."""
    return 0.0 if why_plain(seen) else import_left_s(seen)


def first_start_s(seen: Sight) -> float:
    """Return the duration of a start without its delay, for a base model without earlier starts."""
    return FIRST_START_S["plain" if why_plain(seen) else "zygote"]
