"""What to do about a zygote that does not answer: wait for it, start without it, or replace it. Pure functions of what is seen of it.

Vocabulary: a *plain* start imports vLLM three times, in the server, the engine core and the worker, one after the other. A zygote imports
it once. So a zygote that makes progress, however slowly, is ready sooner than a plain start that would begin beside it and take half of its
processors. Only a zygote that makes no progress is not worth waiting for, and only progress counts, never the time that it takes.
"""

from lmaas.engine.zygote.progress import Sight

#: A zygote that neither answers nor makes progress for so long stands still.
STILL_S = 15.0
#: A zygote that uses so much processor time without answering or finishing a stage runs in circles. Longer if imports usually take long.
CIRCLES_S, CIRCLES_IMPORTS = 60.0, 3.0
#: How long a start takes, in seconds, if none of its base model has been seen: forked, and plain.
FIRST_START_S = {"zygote": 3.0, "plain": 20.0}
#: How long a start goes on waiting for a zygote that stands still or is gone: its owner needs seconds to notice and to start another.
REPLACED_S = 8.0


def stuck(seen: Sight, grace_s: float = 0.0) -> str:
    """Why this zygote, which does not answer, has to be replaced; empty if it makes progress. With `grace_s` it may take so much longer."""
    if seen.still_s > STILL_S + grace_s:
        return f"it has made no progress for {seen.still_s:.0f} s"
    if seen.stage_used_s > max(CIRCLES_S, CIRCLES_IMPORTS * seen.usual_s) + grace_s:
        return f"it has used {seen.stage_used_s:.0f} s of processor time without finishing a stage"
    return ""


def why_plain(seen: Sight) -> str:
    """Why a start does not wait for the zygote any longer; empty if it does."""
    if seen.pid:
        # Its owner replaces it, if it has one.
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
    """How long it takes until a zygote has imported everything, from the processor time that this usually takes and the share that it gets.

    An import that takes longer than usual is taken to need as long again as it is late. A zygote that is not there yet has all before it.
    """
    if seen.serves:
        return 0.0
    left_s = max(min(1.0, seen.usual_s), seen.usual_s - seen.used_s, seen.used_s - seen.usual_s)
    return left_s / seen.share + seen.still_s + (seen.next_s or 0.0 if not seen.pid else 0.0)


def start_delay_s(seen: Sight) -> float:
    """Return by how many seconds starts are delayed at present: they wait for a zygote that imports, if they wait for it at all."""
    return 0.0 if why_plain(seen) else import_left_s(seen)


def first_start_s(seen: Sight) -> float:
    """Return how long a start takes, without its delay, if none of its base model has been seen."""
    return FIRST_START_S["plain" if why_plain(seen) else "zygote"]
