"""Checks grammars of requests outside the engines, in disposable processes with limits of time and memory."""
