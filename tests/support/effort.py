"""How long the tests try that search at random. `make test-long` gives them far more time than CI has."""

import os

#: Times the usual number of examples, histories and seconds.
EFFORT = int(os.environ.get("LMAAS_TEST_EFFORT", "1"))


def tries(usual: int) -> int:
    """Return how many examples a test tries, from how many it usually does."""
    return usual * EFFORT
