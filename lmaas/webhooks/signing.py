"""Signatures of webhooks by the Standard Webhooks specification (https://www.standardwebhooks.com), as OpenAI's client verifies them."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"
KEY_BYTES = 32
#: The characters of a secret after its prefix that lists show.
SHOWN = 4


def new_key() -> bytes:
    """Return a new key of signatures."""
    return secrets.token_bytes(KEY_BYTES)


def secret_of(key: bytes) -> str:
    """Return a key as the text that its owner gives to a client library."""
    return PREFIX + base64.b64encode(key).decode()


def hint_of(key: bytes) -> str:
    """Return the part of the secret that lists show."""
    return secret_of(key)[: len(PREFIX) + SHOWN] + "…"


def signed_headers(event_id: str, timestamp: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """Return the headers of one attempt, with a signature for each of the keys. `timestamp` is the attempt's, in Unix seconds."""
    content = b".".join((event_id.encode(), str(timestamp).encode(), body))
    signatures = [base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
