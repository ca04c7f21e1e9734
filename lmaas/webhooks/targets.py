"""The addresses that webhooks may call.

A tenant chooses the URL, and a job runner calls it from inside the private network. So the name is resolved here, only public addresses are
used, and the connection goes to the very address that was checked. An operator may allow networks of private addresses.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
#: Returns the addresses of a host and port, or raises OSError.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL = 2048
RESOLVE_S = 5.0
#: The addresses of the internet in IPv6. Other blocks are reserved, or translate to other networks.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SETTING = "LMAAS_WEBHOOK_PRIVATE_TARGETS"


class TargetRefused(Exception):
    """The target must not be called, or its address cannot be found. The message is for the tenant."""


def networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list that is separated by commas. Raises ValueError."""
    return tuple(ipaddress.ip_network(each) for part in text.split(",") if (each := part.strip()))


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet, and so do the IPv4 addresses inside it."""
    if isinstance(address, ipaddress.IPv6Address):
        if (mapped := address.ipv4_mapped) is not None:
            return is_public(mapped)
        if address not in _GLOBAL_V6 or address.teredo is not None:
            return False
        if (inner := address.sixtofour) is not None:
            return is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_in(address: Address, allowed: Iterable[Network]) -> bool:
    """Return whether an address is in one of these networks."""
    plain: Address = mapped if isinstance(address, ipaddress.IPv6Address) and (mapped := address.ipv4_mapped) is not None else address
    return any(plain in network for network in allowed)


@dataclass(frozen=True, slots=True)
class Pinned:
    """A target with the address that was checked. `url` has the address in place of the name."""

    url: URL
    host: str
    #: The value of the header `host`.
    authority: str


@dataclass(frozen=True, slots=True)
class Targets:
    """The rules for URLs. `private` are the networks of private addresses that are allowed, also without TLS."""

    private: tuple[Network, ...] = ()

    def parse(self, text: str) -> URL:
        """Return the URL, of which all is checked that needs no look-up. Raises TargetRefused."""
        if not text or len(text) > MAX_URL or not text.isprintable() or " " in text or "\\" in text:
            raise TargetRefused(f"The URL must have 1 to {MAX_URL:,} printable characters, without spaces and backslashes.")
        try:
            url = URL(text)
            host, port = url.host, url.port
        except ValueError as error:
            raise TargetRefused(f"The URL cannot be read: {error}.") from None
        if url.scheme not in ("https", "http") or not host or not port:
            raise TargetRefused("The URL must begin with https:// and name a host, such as https://example.com/events.")
        if url.user is not None or url.password is not None:
            raise TargetRefused("The URL must not have a user or a password. The signature of each event proves its origin.")
        if url.fragment:
            raise TargetRefused("The URL must not have a fragment (#…), which is never sent.")
        if url.scheme == "http" and not self.private:
            raise TargetRefused(f"The URL must begin with https://. An operator may allow http:// for private networks ({_SETTING}).")
        if (address := _literal(host)) is not None:
            self._check(host, [address], url.scheme)
        elif host.rstrip(".").endswith("localhost") and not self.private:
            raise _refused(host)
        return url

    async def pin(self, text: str, resolve: Resolve) -> Pinned:
        """Return the target with an address that may be called. `resolve` looks names up. Raises TargetRefused."""
        url = self.parse(text)
        host = url.host or ""
        literal = _literal(host)
        address = self._check(host, [literal] if literal is not None else await _resolved(url, resolve), url.scheme)
        shown = f"[{host}]" if ":" in host else url.raw_host or host
        authority = shown if url.is_default_port() else f"{shown}:{url.port}"
        return Pinned(url.with_host(str(address)), url.raw_host or host, authority)

    def _check(self, host: str, addresses: Sequence[Address], scheme: str) -> Address:
        """Return the first of the addresses that may be called by this scheme. Raises TargetRefused if there is none."""
        for address in addresses:
            if is_in(address, self.private) or (scheme == "https" and is_public(address)):
                return address
        if scheme == "http" and any(map(is_public, addresses)):
            raise TargetRefused("The URL must begin with https://, because its address is public.")
        raise _refused(host)


def _refused(host: str) -> TargetRefused:
    return TargetRefused(
        f"The address of {host[:100]} is not public. Use a public one, or have an operator allow its network ({_SETTING})."
    )


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


async def _resolved(url: URL, resolve: Resolve) -> list[Address]:
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await resolve(url.raw_host or "", url.port or 0)
    except (OSError, UnicodeError, TimeoutError):
        raise TargetRefused(f"The name {(url.host or '')[:100]} cannot be resolved.") from None
    return [address for text in found if (address := _literal(text)) is not None]
