"""The targets that webhooks may call."""

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from lmaas.config import Settings, load
from lmaas.errors import SettingsError
from lmaas.webhooks import targets
from lmaas.webhooks.targets import TargetRefused, Targets, is_public, networks

PUBLIC = Targets()
LOCAL = Targets(networks("127.0.0.0/8, 10.1.0.0/16,::1/128"))


def resolver(*addresses: str) -> targets.Resolve:
    async def resolve(host: str, port: int) -> Sequence[str]:
        assert host
        assert port
        return addresses

    return resolve


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 (refused, not bound)
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:a00:1::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "2002:808:808::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "printable"),
        ("https://example.com/" + "a" * 2048, "printable"),
        ("https://example.com/a b", "printable"),
        ("https://example.com/\n", "printable"),
        ("https://example.com\\@127.0.0.1/", "printable"),
        ("https://example.com:99999/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("example.com", "must begin with https"),
        ("ftp://example.com/", "must begin with https"),
        ("file:///etc/passwd", "must begin with https"),
        ("https:///events", "must begin with https"),
        ("https://example.com:0/", "must begin with https"),
        ("http://example.com/", "must begin with https"),
        ("https://user@example.com/", "user or a password"),
        ("https://:secret@example.com/", "user or a password"),
        ("https://example.com/#part", "fragment"),
        ("https://127.0.0.1/", "not public"),
        ("https://[::1]/", "not public"),
        ("https://[::ffff:169.254.169.254]/", "not public"),
        ("https://[fe80::1%25eth0]/", "not public"),
        ("https://localhost/", "not public"),
        ("https://db.localhost./", "not public"),
    ],
)
def test_urls_that_are_refused_at_once(url: str, words: str) -> None:
    with pytest.raises(TargetRefused, match=words):
        PUBLIC.parse(url)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "internal.example"])
async def test_what_a_name_means_is_decided_by_its_addresses(host: str) -> None:
    with pytest.raises(TargetRefused, match="not public"):
        await PUBLIC.pin(f"https://{host}/", resolver("127.0.0.1", "10.0.0.8", "::1"))


async def test_a_target_is_called_at_the_address_that_was_checked() -> None:
    pinned = await PUBLIC.pin("https://example.com:8443/events?x=1", resolver("10.0.0.1", "93.184.216.34"))
    assert (str(pinned.url), pinned.host, pinned.authority) == ("https://93.184.216.34:8443/events?x=1", "example.com", "example.com:8443")
    pinned = await PUBLIC.pin("https://bücher.example/", resolver("2606:4700::1"))
    assert (str(pinned.url), pinned.host, pinned.authority) == (
        "https://[2606:4700::1]/",
        "xn--bcher-kva.example",
        "xn--bcher-kva.example",
    )
    pinned = await PUBLIC.pin("https://[2606:4700::1]:8443/", resolver())
    assert (str(pinned.url), pinned.authority) == ("https://[2606:4700::1]:8443/", "[2606:4700::1]:8443")


async def test_an_operator_may_allow_networks() -> None:
    for url in ("http://localhost:9000/", "https://localhost/", "http://hooks.internal/"):
        assert (await LOCAL.pin(url, resolver("::1", "127.0.0.1"))).url.host == "::1"
    assert (await LOCAL.pin("http://127.0.0.1:9000/", resolver())).authority == "127.0.0.1:9000"
    assert (await LOCAL.pin("http://[::ffff:10.1.2.3]/", resolver())).url.host == "::ffff:a01:203"
    assert (await LOCAL.pin("https://example.com/", resolver("8.8.8.8"))).url.host == "8.8.8.8"
    with pytest.raises(TargetRefused, match="not public"):
        await LOCAL.pin("https://other.internal/", resolver("10.2.0.1"))
    with pytest.raises(TargetRefused, match="because its address is public"):
        await LOCAL.pin("http://example.com/", resolver("8.8.8.8"))


async def test_a_name_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError(host, port)

    async def silent(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        raise AssertionError(host, port)

    monkeypatch.setattr(targets, "RESOLVE_S", 0.01)
    for resolve in (unknown, silent, resolver()):
        with pytest.raises(TargetRefused, match=r"cannot be resolved|not public"):
            await PUBLIC.pin("https://example.com/", resolve)


def test_the_setting_is_a_list_of_networks() -> None:
    assert networks(load({"LMAAS_WEBHOOK_PRIVATE_TARGETS": "10.0.0.0/8, ::1/128 ,"}).webhook_private_targets) == networks(
        "10.0.0.0/8,::1/128"
    )
    assert networks(Settings().webhook_private_targets) == ()
    for wrong in ("10.0.0.1/8", "all", "true", "10.0.0.0/8;127.0.0.0/8"):
        with pytest.raises(SettingsError, match="is no network"):
            load({"LMAAS_WEBHOOK_PRIVATE_TARGETS": wrong})
