"""Request parameters of chat completions and completions: which are forwarded, accepted or refused, and how each is checked."""
