"""API keys: random, prefixed, shown once, stored hashed."""

import hashlib
import re
import secrets

from lmaas.errors import SettingsError

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


_GIVEN = re.compile(re.escape(PREFIX) + r"([A-Za-z0-9_-]{32,})")
#: A random key of 32 characters has more different ones than this, but for once in many million times.
MIN_DIFFERENT = 10


def check_given_key(key: str) -> str:
    """The operator's key as somebody chose it. Raises SettingsError for one that could be guessed: a placeholder, a short one."""
    found = _GIVEN.fullmatch(key)
    if found is None or len(set(found[1].lower())) < MIN_DIFFERENT:
        raise SettingsError(
            f"LMAAS_OPERATOR_KEY must be '{PREFIX}' and at least 32 random letters, digits, '-' or '_'. "
            f"`python3 -c 'import secrets; print(\"{PREFIX}\" + secrets.token_urlsafe(32))'` makes one."
        )
    return key
