"""A clock that the test advances."""


class Clock:
    """A clock that the test advances. It records the time of its first call."""

    def __init__(self) -> None:
        self.now, self.first = 1000.0, -1.0

    def __call__(self) -> float:
        if self.first < 0:
            self.first = self.now
        return self.now

    @property
    def passed_ms(self) -> int:
        return int((self.now - self.first) * 1000)
