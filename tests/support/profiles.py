"""An engine's profile in round numbers, so that expected times can be added up by hand."""

from lmaas.simulation.profile import Profile

#: A tenth of a second per step, and per hundred prompt tokens.
ROUND = Profile(
    spawn_s=1.0,
    start_s=2.0,
    notice_s=0.5,
    stop_s=1.0,
    load_s=0.25,
    overhead_s=0.0,
    step_s=0.1,
    step_sequence_s=0.0,
    prefill_tokens_per_s=1000.0,
    step_tokens=1000,
    slots=4,
    adapter_slots=2,
    adapters_resident=4,
)
