"""Who gets in and what leaves: the NetworkPolicies let through what the pods need, and nothing besides."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.k8s.conftest import Chart, Manifest, ci_file, only
from tests.k8s.test_service_pod import environment


def test_helms_own_test_gets_in(chart: Chart) -> None:
    for file in (ci_file("production"), ci_file("gateway-hpa")):
        manifests = chart.render(files=[file])
        labels = only(manifests, "Pod")["metadata"]["labels"]
        rules = only(manifests, "NetworkPolicy", "clip")["spec"]["ingress"]
        named = [
            peer["podSelector"]["matchLabels"].items() <= labels.items()
            for rule in rules
            if {"port": "http", "protocol": "TCP"} in rule["ports"]
            for peer in rule["from"]
            if "podSelector" in peer
        ]
        assert named == [True], file
    without = only(chart.render({"tests.enabled": False}, files=[ci_file("gateway-hpa")]), "NetworkPolicy")
    assert "podSelector" not in str(without["spec"]["ingress"])


def test_nothing_leaves_but_what_is_named(chart: Chart) -> None:
    def egress(manifests: list[Manifest]) -> list[set[int | str]]:
        policies = [
            m for m in manifests if m["kind"] == "NetworkPolicy" and not m["metadata"]["name"].endswith("redis")
        ]
        (policy,) = policies
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        return [{port["port"] for port in rule["ports"]} for rule in policy["spec"]["egress"]]

    assert egress(chart.render()) == [{53}]
    assert egress(chart.render(files=[ci_file("production")])) == [{53}, {"redis"}]
    assert egress(chart.render(files=[ci_file("gpu")])) == [{53}, {443}]
    assert egress(chart.render(files=[ci_file("gateway-hpa")])) == [{53}, {6380}, {4318}, {443}]
    assert egress(chart.render({"networkPolicy.dnsPorts": [53, 5353]})) == [{53, 5353}]
    for hosts in (["pictures.example.com"], "pictures.example.com"):
        fetching = chart.render({"settings.image_url_hosts": hosts})
        assert egress(fetching) == [{53}, {443}]
        open_to = only(fetching, "NetworkPolicy")["spec"]["egress"][1]
        assert open_to == only(chart.render(files=[ci_file("gpu")]), "NetworkPolicy")["spec"]["egress"][1]
    hub = only(chart.render(files=[ci_file("gpu")]), "NetworkPolicy")["spec"]["egress"][1]["to"]
    allowed = [
        (ipaddress.ip_network(to["ipBlock"]["cidr"]), [ipaddress.ip_network(no) for no in to["ipBlock"]["except"]])
        for to in hub
    ]

    def reachable(address: str) -> bool:
        wanted = ipaddress.ip_address(address)
        return any(wanted in cidr and not any(wanted in no for no in nots) for cidr, nots in allowed)

    assert reachable("1.1.1.1")
    assert reachable("2606:4700::1111")
    # Where clouds hand out credentials, and a private address by NAT64 and by 6to4.
    for closed in ("169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "64:ff9b::a9fe:a9fe", "2002:a00:1::"):
        assert not reachable(closed), closed
    for closed in ("10.1.2.3", "192.168.0.1", "fd12:3456::1", "fe80::1"):
        assert not reachable(closed), closed
    for cidr, nots in allowed:
        assert all(no.subnet_of(cidr) and no != cidr for no in nots)  # type: ignore[arg-type]
    # A pod that may not reach the hub must not spend minutes on trying.
    assert environment(chart.render())["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment(chart.render(files=[ci_file("gpu")]))


@pytest.mark.parametrize(
    ("redis", "port"),
    [
        ({"url": "rediss://u:p@h:6380/0"}, 6380),
        ({"url": "rediss://u:p@h:6380/0", "port": 6380}, 6380),
        ({"url": "redis://h"}, 6379),
        ({"url": "redis://user:1234@h/0?timeout=5"}, 6379),
        ({"url": "redis://:p%3A9@h:7000"}, 7000),
        ({"url": "redis://[fd00::6380]/0"}, 6379),
        ({"url": "redis://[fd00::1]:6390?db=1"}, 6390),
        # The URL is in a Secret that the chart does not read.
        ({"existingSecret": "mine"}, 6379),
        ({"existingSecret": "mine", "port": 6380}, 6380),
        ({"existingSecret": "mine", "url": "redis://unused:7000", "port": 6380}, 6380),
    ],
)
def test_the_policy_lets_the_service_reach_its_redis(chart: Chart, redis: dict[str, Any], port: int) -> None:
    manifests = chart.render({"redis": {"mode": "external", **redis}})
    assert only(manifests, "NetworkPolicy")["spec"]["egress"][1] == {"ports": [{"port": port, "protocol": "TCP"}]}
    if "existingSecret" not in redis:
        address = environment(manifests)["IRONCLIP_REDIS_URL"]
        assert (urlsplit(address).port or 6379) == port
