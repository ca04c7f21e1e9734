"""API keys: random, prefixed, shown once, stored hashed."""

import hashlib
import re
import secrets

from lmaas.errors import SettingsError

PREFIX = "sk-lmaas-"
#: The number of a key's characters that are stored in clear, so that people can distinguish keys.
SHOWN = len(PREFIX) + 6


def new_key() -> str:
    """Return a new key with 256 random bits. It is shown to its owner once and never stored."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hex, which is what is stored. Keys are random, so a slow hash would not protect them better."""
    return hashlib.sha256(key.encode()).hexdigest()


def shown_prefix(key: str) -> str:
    """Return the part of a key that lists show."""
    return key[:SHOWN]


_GIVEN = re.compile(re.escape(PREFIX) + r"([A-Za-z0-9_-]{32,})")
#: A random key of 32 characters practically always has more different characters than this.
MIN_DIFFERENT = 10


def check_given_key(key: str, setting: str = "LMAAS_OPERATOR_KEY") -> str:
    """Return an operator key that a person chose. Raises SettingsError if it could be guessed: a placeholder, or a short key."""
    found = _GIVEN.fullmatch(key)
    if found is None or len(set(found[1].lower())) < MIN_DIFFERENT:
        raise SettingsError(
            f"{setting} must be '{PREFIX}' and at least 32 random letters, digits, '-' or '_'. "
            f"`python3 -c 'import secrets; print(\"{PREFIX}\" + secrets.token_urlsafe(32))'` prints one."
        )
    return key
