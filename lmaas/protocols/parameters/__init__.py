"""The request parameters of chat completions and completions: a table of all, and the checks of their values."""
