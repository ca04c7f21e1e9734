"""The speed of an engine, measured or guessed, which the simulation assumes of every engine."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lmaas.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of one engine, `_s` in seconds, and its sizes.

    The defaults are meant to be this project's development machine (docs/how-to/simulation.md lists the measured and the estimated ones): 2
    cores, SmolLM2-135M with rank-8 adapters in float32, engines forked from the zygote (`start_s` is 18 without it). `python -m bench.bill`
    measures them on another machine.
    """

    #: From the controller's decision to the engine's launch: a supervisor process starts. This is not engine time.
    spawn_s: float = 1.2
    #: From the launch until it has generated its first token.
    start_s: float = 1.5
    #: From the controller's decision to stop until no more work is taken.
    notice_s: float = 0.6
    #: From the end of the last request until the process is gone.
    stop_s: float = 1.0
    #: One adapter, fetched and loaded.
    load_s: float = 0.05
    #: Time that gateway, queue and network add before the first token.
    overhead_s: float = 0.006
    #: A step of the engine makes one token for each sequence that runs: `step_s` + `step_sequence_s` for each.
    step_s: float = 0.023
    step_sequence_s: float = 0.0019
    #: Prompt tokens that a step takes in besides, at this rate, `step_tokens` at most.
    prefill_tokens_per_s: float = 1250.0
    step_tokens: int = 2048
    #: Sequences at once, adapters at once, adapters in memory.
    slots: int = 16
    adapter_slots: int = 8
    adapters_resident: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name in MAY_BE_ZERO else math.ulp(0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise SettingsError(f"{field.name} of an engine's profile must be a number of at least 0, not {value!r}.")
            if field.type is int and not isinstance(value, int):
                raise SettingsError(f"{field.name} of an engine's profile must be a whole number, not {value!r}.")


MAY_BE_ZERO = frozenset({"spawn_s", "start_s", "notice_s", "stop_s", "load_s", "overhead_s", "step_sequence_s"})


def read_profile(path: Path) -> Profile:
    """Read a profile from JSON. Values that are not in the file are defaults. Raises SettingsError for an invalid file."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"The profile {path} cannot be read: {error}") from error
    known = [field.name for field in fields(Profile)]
    if not isinstance(given, dict) or not set(given) <= set(known):
        raise SettingsError(f"The profile {path} must be a JSON object with some of these numbers: {', '.join(known)}.")
    return Profile(**given)


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile, for `read_profile`."""
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n")
