"""Signatures are those of the Standard Webhooks specification."""

import base64
import hashlib
import hmac

import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from lmaas.webhooks.signing import PREFIX, hint_of, new_key, secret_of, signed_headers


def test_a_signature_of_the_specification() -> None:
    """The example of https://github.com/standard-webhooks/standard-webhooks."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [key])
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_each_key_has_a_signature() -> None:
    keys = [new_key(), new_key()]
    signatures = signed_headers("evt_1", 5, b"{}", keys)["webhook-signature"].split(" ")
    expected = ["v1," + base64.b64encode(hmac.digest(key, b"evt_1.5.{}", hashlib.sha256)).decode() for key in keys]
    assert signatures == expected


def test_a_secret_is_long_and_its_hint_short() -> None:
    key = new_key()
    assert base64.b64decode(secret_of(key).removeprefix(PREFIX)) == key
    assert len(key) >= 24
    assert len({new_key() for _ in range(10)}) == 10
    assert hint_of(key)[:-1] == secret_of(key)[: len(PREFIX) + 4]


def test_openais_client_accepts_only_what_was_signed() -> None:
    key, body = new_key(), b'{"object":"event","id":"evt_1","created_at":1,"type":"batch.completed","data":{"id":"batch_1"}}'
    client = OpenAI(api_key="none", webhook_secret=secret_of(key))
    now = 1_700_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: now + 100)
        headers = signed_headers("evt_1", now, body, [new_key(), key])
        event = client.webhooks.unwrap(body, headers)
        assert (event.type, event.id, event.data.id) == ("batch.completed", "evt_1", "batch_1")
        for wrong in (headers | {"webhook-id": "evt_2"}, headers | {"webhook-timestamp": str(now + 1)}):
            with pytest.raises(InvalidWebhookSignatureError):
                client.webhooks.unwrap(body, wrong)
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers)
    client.close()
