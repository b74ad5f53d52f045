"""Which URLs and which addresses a picture may be fetched from; nothing here opens a connection.

A URL is read by one strict reader, whose parts are what is then asked for: nothing is left for a second reader to
understand differently. Names are brought into their canonical form (IDNA) before they are compared.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import idna

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_MOST_CHARS = 2048
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.I)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@%]+)(?::(\d{1,5}))?")
# Control characters, blanks, the other slash, and what readers of URLs drop or map in silence.
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2000-\u200f\u2028-\u202f\u2060-\u206f\ufeff]")
_NUMBER = re.compile(r"(\d+|0x[0-9a-f]*)")
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What is given out as global unicast; the rest of IPv6 is local, special, or nobody's yet.
_UNICAST = ipaddress.IPv6Network("2000::/3")
# Not public, or not a picture's home, though some version of Python takes them for global: Azure's host, the old relays
# of 6to4, networks of protocols and of documentation.
_NEVER = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.88.99.0/24", "192.0.0.0/24", "3fff::/20")))


class Denied(Exception):
    """This is not fetched; the reason is one of a few words, for the log and never for the caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Location:
    """A URL taken apart: host in canonical form (an IPv6 address without brackets), and the path with its query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def header(self) -> str:
        """The value of `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class HostRule:
    """A host that may be asked, or with a dot in front every host below it; `port` None: the scheme's own."""

    host: str
    port: int | None

    def allows(self, place: Location) -> bool:
        """Whether this location is within the rule."""
        if place.port != (_PORTS[place.scheme] if self.port is None else self.port):
            return False
        return place.host.endswith(self.host) if self.host.startswith(".") else place.host == self.host


def read_rule(text: str) -> HostRule:
    """Read `host`, `.suffix`, `host:port` or `.suffix:port`; raises ValueError that says what is wrong."""
    suffix = text.startswith(".")
    match = _AUTHORITY.fullmatch(text.removeprefix("."))
    try:
        if match is None or "*" in text or "/" in text:
            raise Denied("form")
        host = canonical_host(match[1])
    except Denied:
        raise ValueError(f"{text!r} is not a host, `.suffix`, or either with `:port`") from None
    if suffix and _is_address(host):
        raise ValueError(f"{text!r}: an address has nothing below it")
    port = int(match[2]) if match[2] else None
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"{text!r}: a port is a number from 1 to 65535")
    return HostRule(f".{host}" if suffix else host, port)


def read_url(text: str, rules: Sequence[HostRule], *, plain: bool = False) -> Location:
    """Take a URL apart and see whether it may be asked for.

    Args:
        text: as the caller, or a redirect, has it.
        rules: the hosts that may be asked.
        plain: whether `http` is allowed too.

    Raises:
        Denied: the form, the scheme, or the host.
    """
    match = _URL.fullmatch(text) if len(text) <= _MOST_CHARS and not _FORBIDDEN.search(text) else None
    authority = _AUTHORITY.fullmatch(match[2]) if match is not None else None
    if match is None or authority is None:
        raise Denied("form")
    scheme = match[1].lower()
    if scheme != "https" and not plain:
        raise Denied("scheme")
    port = int(authority[2]) if authority[2] else _PORTS[scheme]
    target = quote(match[3], safe="/?:@!$&'()*+,;=-._~%")
    place = Location(scheme, canonical_host(authority[1]), port, target if target[:1] == "/" else f"/{target}")
    if not any(rule.allows(place) for rule in rules):
        raise Denied("host")
    return place


def canonical_host(text: str) -> str:
    """A name in lower case and ASCII without its last dot, or an address as `ipaddress` writes it.

    Raises:
        Denied: it is neither, or a number that some systems would take for an address.
    """
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise Denied("form") from None
    try:
        name = idna.encode(text, uts46=True, std3_rules=True, transitional=False).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError):
        raise Denied("form") from None
    name = name.removesuffix(".")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise Denied("form") from None
    if not name:
        raise Denied("form")
    return name


def may_dial(text: str, networks: Sequence[IPNetwork] = ()) -> bool:
    """Whether an address that a name was resolved to may be connected to: a global one, or one of ``networks``."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        address = address.ipv4_mapped or address
    if any(address in network for network in networks):
        return True
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_global(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None and not _is_global(address.sixtofour):
            return False
    return _is_global(address)


def _is_global(address: IPAddress) -> bool:
    return (
        address.is_global
        and not (address.is_private or address.is_multicast or address.is_reserved or address.is_unspecified)
        and not (address.is_loopback or address.is_link_local)
        and (address.version == 4 or address in _UNICAST)
        and not any(address in network for network in _NEVER)
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
