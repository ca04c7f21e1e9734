"""The number of tries of tests that search at random. `make test-long` makes far more than CI."""

import os

#: The factor for the usual number of examples, histories and seconds.
EFFORT = int(os.environ.get("LMAAS_TEST_EFFORT", "1"))


def tries(usual: int) -> int:
    """Return the number of examples that a test tries, from its usual number."""
    return usual * EFFORT
