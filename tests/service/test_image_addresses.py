"""Which URLs and addresses pass, and the many spellings of those that must not."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.image_addresses import Denied, Location, may_dial, read_rule, read_url

RULES = [read_rule(text) for text in ("img.example", ".cdn.example", "other.example:8443", "bücher.example", "8.8.8.8")]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://img.example/a.png", ("img.example", 443, "/a.png")),
        ("HTTPS://IMG.Example./a.png?x=1#part", ("img.example", 443, "/a.png?x=1")),
        ("https://img.example:443", ("img.example", 443, "/")),
        ("https://img.example?x", ("img.example", 443, "/?x")),
        ("https://a.b.cdn.example/é b".replace(" ", "%20"), ("a.b.cdn.example", 443, "/%C3%A9%20b")),
        ("https://other.example:8443/", ("other.example", 8443, "/")),
        ("https://BÜCHER.example/", ("xn--bcher-kva.example", 443, "/")),
        ("https://xn--bcher-kva.example/", ("xn--bcher-kva.example", 443, "/")),
        ("https://img\u3002example/", ("img.example", 443, "/")),  # what it means, and is compared as
        ("https://8.8.8.8/", ("8.8.8.8", 443, "/")),
        ("https://img.example/@evil.example", ("img.example", 443, "/@evil.example")),
    ],
)
def test_urls_that_pass(url: str, expected: tuple[str, int, str]) -> None:
    assert read_url(url, RULES) == Location("https", *expected)


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example/",
        "ftp://img.example/",
        "file:///etc/passwd",
        "file://img.example/etc/passwd",
        "gopher://img.example/",
        "https://evil.example/",
        "https://img.example.evil.example/",
        "https://evilcdn.example/",
        "https://cdn.example/",  # `.suffix` is what is below it
        "https://img.example:8443/",
        "https://other.example/",
        "https://img.example:0/",
        "https://img.example:99999999/",
        "https://img.example:/",
        "https://user@img.example/",
        "https://user:secret@img.example/",
        "https://img.example@evil.example/",
        "https://evil.example\\@img.example/",
        "https://evil.example#@img.example/",
        "https://evil.example?@img.example/",
        "https://img.example\\.evil.example/",
        "https:///img.example/",
        "https:img.example/",
        "https:/img.example/",
        "//img.example/",
        " https://img.example/",
        "https://img.example/ ",
        "https://img.exa\nmple/",
        "https://img.example/\r\nX: y",
        "https://img.example\x00/",
        "https://img\u200b.example/",
        "https://img%2eexample/",
        "https://127.0.0.1/",
        "https://127\u30020\u30020\u30021/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://8.8.2056/",
        "https://010.8.8.8/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[img.example]/",
        "https://①②⑦.⓪.⓪.①/",
        "https://" + "a" * 3000 + ".example/",
        "https://-.example/",
        "https://.../",
        "https://",
        "",
    ],
)
def test_urls_that_do_not(url: str) -> None:
    with pytest.raises(Denied):
        read_url(url, RULES)


def test_http_is_for_those_who_ask_for_it() -> None:
    assert read_url("http://img.example/", RULES, plain=True) == Location("http", "img.example", 80, "/")
    with pytest.raises(Denied):
        read_url("http://img.example:443/", RULES, plain=True)
    with pytest.raises(Denied):
        read_url("ws://img.example/", RULES, plain=True)


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.example", "https://img.example", "img.example/", "a b", "a:b", "a:0", "a:70000", ".8.8.8.8", "@a"],
)
def test_rules_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|port|below"):
        read_rule(text)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    for url in (text, f"https://{text}", f"https://img.example{text}"):
        try:
            place = read_url(url, RULES)
        except Denied:
            continue
        assert any(rule.allows(place) for rule in RULES)
        assert place.target.isascii()
        assert place.target.isprintable()
        assert " " not in place.target


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_dialled(address: str) -> None:
    assert may_dial(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.1.2.3", "168.63.129.16",
        "169.254.169.254", "172.16.0.1", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a00:1",
        "64:ff9b:1::808:808", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::1", "2002:a9fe:a9fe::1", "fc00::1",
        "fd00:ec2::254", "fe80::1", "fe80::1%lo", "2606:4700::1111%lo", "fec0::1", "ff02::1", "3fff::1",
        "localhost", "2130706433", "",
    ],
)  # fmt: skip
def test_everything_else_is_not(address: str) -> None:
    assert not may_dial(address)


def test_networks_that_are_named_may_be_dialled() -> None:
    networks = [ip_network("127.0.0.0/8"), ip_network("fd00::/8")]
    assert may_dial("127.0.0.1", networks)
    assert may_dial("::ffff:127.0.0.1", networks)
    assert may_dial("fd00::1", networks)
    assert not may_dial("10.0.0.1", networks)
    assert not may_dial("fd00::1%eth0", networks)
    assert not may_dial("64:ff9b::7f00:1", networks)
