"""API keys: random, prefixed, shown once, stored hashed."""

import hashlib
import secrets

PREFIX = "sk-lmaas-"
#: So many characters are kept in clear, for people to tell keys apart.
SHOWN = len(PREFIX) + 6


def new_key() -> str:
    """A key of 256 random bits. It is shown to its owner once and never stored."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored: SHA-256, in hex. The keys are random, so a slow hash would protect nothing more."""
    return hashlib.sha256(key.encode()).hexdigest()


def shown_prefix(key: str) -> str:
    """The part of a key that lists show."""
    return key[:SHOWN]
