"""The structured output and the tool that the tests of several libraries use."""

from pydantic import BaseModel

#: The fake engine calls a tool when a user message contains this text.
CALL = "Use the tool."


class Stop(BaseModel):
    """A part of a trip."""

    city: str
    days: int


class Trip(BaseModel):
    """A structured output, with a type inside it."""

    first: Stop
    paid: bool


class Weather:
    """A tool that counts its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, city: str, days: int) -> str:
        """Return the weather of a city."""
        self.asked.append((city, days))
        return f"Sunny in {city}."
