"""Checks a request's grammar outside the engines: a disposable process compiles it first, under limits of time and memory."""
