"""Probes beside each other in one worker: whose fault, whose end, and whose events are whose."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

import pytest
import torch

from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import NotReady, Overloaded
from ironclip.labels import LabelSet
from ironclip.probe import Probe, ProbeOptions, Target, VectorTarget, rows_for
from service.probe_job import Job
from service.probe_ledger import Ledger
from service.probe_places import Places, seconds_until_begun
from service.probing import Prober
from tests.conftest import make_tiny_encoder

ENDLESS = ProbeOptions(eps=(8.0,), effort="thorough", seconds=600)


class Refusing(Target):
    """Answers the clean picture, and nothing after."""

    asked = 0

    def answers(self, picture: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        object.__setattr__(self, "asked", self.asked + 1)
        if self.asked > 1:
            raise RuntimeError("no memory for this label set")
        return super().answers(picture, seed)


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return make_tiny_encoder().served()


def job(target: Target, options: ProbeOptions, loop: asyncio.AbstractEventLoop, seed: int = 0) -> Job:
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Job(lambda: Probe(target, picture, options), loop, seconds=options.seconds)


def prober(most: int = 8, places: Places | None = None) -> Prober:
    places = places or Places(most)
    return Prober(
        rows_for(torch.device("cpu")), places=places, wake=lambda: None, describe=lambda error: {"detail": str(error)}
    )


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_follower_gets_what_comes_while_it_is_told() -> None:
    async def follow() -> list[str]:
        one = Job(lambda: pytest.fail("it is not built"), asyncio.get_running_loop(), seconds=1)
        one.emit("started", {})
        await settle()
        told = []
        async for event in one.follow():
            told.append(event.kind)
            if event.kind == "started":
                one.emit("progress", {})
                one.emit("done", {})
                await settle()  # both have come before the next is asked for
        return told

    assert asyncio.run(asyncio.wait_for(follow(), 5)) == ["started", "progress", "done"]


def test_what_fails_while_it_is_confirmed_fails_alone(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat", "cow"]))

    async def run() -> list[Job]:
        loop, worker = asyncio.get_running_loop(), prober()
        wide = ProbeOptions(eps=(64.0,), seconds=600)  # breaks at once, so it is confirmed at once
        jobs = [job(Target(classifier), wide, loop, 1), job(Refusing(classifier), wide, loop, 2)]
        jobs.append(job(Target(classifier), wide, loop, 3))
        for one in jobs:
            worker.submit(one)
        while not all(one.ended for one in jobs):
            worker.step()
            await settle()
        assert not worker.pending
        return jobs

    jobs = asyncio.run(asyncio.wait_for(run(), 120))
    assert [one.status for one in jobs] == ["done", "failed", "done"]
    assert all(one.probe is None for one in jobs)  # let go of


@pytest.mark.parametrize("how", ["cancelled", "overdue"])
def test_one_that_is_to_end_ends_with_the_next_step(tiny: Encoder, how: str) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> tuple[Job, Job, int]:
        loop, worker = asyncio.get_running_loop(), prober()
        # A cosine is never below -1: they go on until they are ended.
        target = VectorTarget(classifier, cosine_below=-1.0)
        first, other = (job(target, ENDLESS, loop, seed) for seed in (4, 5))
        worker.submit(first)
        worker.submit(other)
        for _ in range(5):
            worker.step()
        assert not worker.urgent
        if how == "cancelled":
            first.cancelled = True
        else:
            first.deadline = 0.0
        assert worker.urgent
        worker.step()
        await settle()
        ended: Any = first.status
        for _ in range(12):
            worker.step()
        await settle()
        assert ended == ("cancelled" if how == "cancelled" else "done")
        return first, other, worker.running

    first, other, running = asyncio.run(asyncio.wait_for(run(), 120))
    assert running == 1
    assert other.status == "running"
    if how == "overdue":
        assert first.events[-1].data["status"] == "budget_exhausted"


def test_what_is_cancelled_while_it_waits_ends_at_once(tiny: Encoder) -> None:
    """With all places taken, and none that is about to be free."""
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> Job:
        loop, worker = asyncio.get_running_loop(), prober(most=32)
        target = VectorTarget(classifier, cosine_below=-1.0)
        for seed in range(16):
            worker.submit(job(target, ENDLESS, loop, seed))
        while worker._waiting:
            worker.step()
        last = job(target, ENDLESS, loop, 99)
        worker.submit(last)
        worker.step()
        assert not worker.urgent
        last.cancelled = True
        assert worker.urgent
        worker.step()
        await settle()
        assert not worker.urgent
        assert worker.running == 16
        return last

    last = asyncio.run(asyncio.wait_for(run(), 120))
    assert last.status == "cancelled"
    with pytest.raises(RuntimeError, match="has ended"):
        last.build()  # let go of, with the picture


def test_one_tenant_does_not_take_all_places_nor_all_turns(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> list[str]:
        loop, places = asyncio.get_running_loop(), Places(8, shared=True)
        worker, other = prober(places=places), prober(places=places)
        target, order = VectorTarget(classifier, cosine_below=-1.0), list[str]()

        def of(tenant: str, seed: int) -> Job:
            picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)

            def build() -> Probe:
                order.append(tenant)
                return Probe(target, picture, ENDLESS)

            return Job(build, loop, seconds=1, tenant=tenant)

        for seed in range(2):
            worker.submit(of("a", seed))
        with pytest.raises(Overloaded, match="of this tenant") as refused:
            worker.submit(of("a", 3))
        assert (refused.value.limit_name, refused.value.limit) == ("probes-of-tenant", 2)
        # It has no further places in another encoder's worker.
        with pytest.raises(Overloaded, match="of this tenant"):
            other.submit(of("a", 3))
        worker.submit(of("b", 4))
        while len(order) < 3:
            worker.step()
        worker.stop()
        while worker.pending:
            worker.step()
        return order

    assert asyncio.run(asyncio.wait_for(run(), 60)) == ["a", "b", "a"]


def test_a_tenant_that_has_all_places_keeps_no_other_out(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> None:
        loop, worker = asyncio.get_running_loop(), prober(places=Places(64, shared=True))
        target = VectorTarget(classifier, cosine_below=-1.0)

        def of(tenant: str, seed: int, patience: float = math.inf) -> Job:
            picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
            one = Job(lambda: Probe(target, picture, ENDLESS), loop, seconds=60, tenant=tenant)
            one.deadline = time.monotonic() + patience
            return one

        for seed in range(16):
            worker.submit(of("a", seed))
        while worker._waiting:
            worker.step()
        waits = of("b", 20, patience=10)
        worker.submit(waits)  # the door promises that it begins in time
        for _ in range(200):
            if waits.started:
                break
            worker.step()
        assert waits.started
        assert len(worker._active) == 17
        # One such place a tenant: its second probe has to wait for one that ends, and is told how long.
        worker.submit(of("b", 21))
        with pytest.raises(Overloaded, match="run and wait may take") as refused:
            worker.submit(of("b", 22, patience=10))
        assert 1 < (refused.value.retry_after or 0) <= 60
        for _ in range(200):
            worker.step()
        assert len(worker._active) == 17
        worker.submit(of("c", 23, patience=10))
        worker.stop()
        while worker.pending:
            worker.step()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_how_long_a_probe_waits_counts_those_that_run() -> None:
    async def run() -> None:
        loop, now = asyncio.get_running_loop(), time.monotonic()

        def one(seconds: float, begun: bool, deadline: float = math.inf) -> Job:
            made = Job(lambda: pytest.fail("it is not built"), loop, seconds=seconds)
            made.started, made.deadline = now if begun else 0.0, deadline
            return made

        def waits(waiting: list[Job], active: list[Job]) -> float:
            return seconds_until_begun("", waiting, active)

        assert waits([], [one(60, True) for _ in range(15)]) == 0
        full = [one(60, True) for _ in range(16)]
        assert waits([], full) == pytest.approx(60, abs=2)
        # The first place that is free goes to the one that waits, and it has it for as long as it may.
        brief = [one(20, True), *full[1:]]
        assert waits([one(30, False)], brief) == pytest.approx(50, abs=2)
        assert waits([one(30, False, now + 25)], brief) == pytest.approx(25, abs=2)
        assert waits([], [one(60, True, now + 7), *full[1:]]) == pytest.approx(7, abs=2)
        # One beyond the places leaves none free when it ends.
        assert waits([], [one(5, True), *full]) == pytest.approx(60, abs=2)
        assert seconds_until_begun("b", [one(30, False)], full) == 0
        # Where they mostly end long before their time, nobody is sent away for what they might take.
        assert seconds_until_begun("", [], full, used=0.1) == pytest.approx(6, abs=1)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_places_are_those_of_all_encoders_and_every_tenant_has_its_share(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        target = VectorTarget(classifier, cosine_below=-1.0)
        places = Places(3)
        first, second = prober(places=places), prober(places=places)
        for seed, worker in enumerate((first, second, second)):
            worker.submit(job(target, ENDLESS, loop, seed))
        for worker in (first, second):
            with pytest.raises(Overloaded, match="3 probes run and wait, at most 3"):
                worker.submit(job(target, ENDLESS, loop, 9))
        second.stop()
        while second.pending:
            second.step()
        first.submit(job(target, ENDLESS, loop, 9))
        del second  # as an encoder that is unloaded
        assert places.taken() == 2
        # With keys a tenant whose name is empty is one too; without keys there are no tenants.
        keyed = prober(places=Places(4, shared=True))
        keyed.submit(job(target, ENDLESS, loop, 1))
        with pytest.raises(Overloaded, match="of this tenant"):
            keyed.submit(job(target, ENDLESS, loop, 2))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_probe_that_is_beginning_is_one_of_its_tenants(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))
    seen: list[int] = []

    async def run() -> None:
        worker = prober(places=Places(4, shared=True))
        target = VectorTarget(classifier, cosine_below=-1.0)

        def build() -> Probe:
            seen.append(worker.running_of("a"))
            return Probe(target, torch.zeros(3, 32, 32, dtype=torch.uint8), ENDLESS)

        worker.submit(Job(build, asyncio.get_running_loop(), seconds=1, tenant="a"))
        worker.step()
        seen.append(worker.running_of("a"))

    asyncio.run(asyncio.wait_for(run(), 60))
    assert seen == [1, 1]


def test_what_is_remembered_of_ended_probes_is_bounded_by_bytes_and_pictures_are_held_once(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat", "cow"]))

    async def run() -> None:
        loop, worker = asyncio.get_running_loop(), prober(most=8)
        picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        wide = ProbeOptions(eps=(64.0,), seconds=600)
        jobs = []
        for _ in range(4):
            one = Job(lambda: Probe(Target(classifier), picture, wide), loop, seconds=600, artefacts=("adversarial",))
            jobs.append(one)
            worker.submit(one)
        while not all(one.ended for one in jobs):
            worker.step()
            await settle()
        told, answer = ({event.kind: event.data for event in jobs[0].events}[kind] for kind in ("artefacts", "done"))
        assert told["adversarial"] is answer["artefacts"]["adversarial"]
        size = jobs[0].size
        assert len(told["adversarial"]) < size < 2 * len(told["adversarial"]) + 20_000
        ledger = Ledger(None, "x", b"", ttl=60, most_bytes=2 * size + 10)
        for one in jobs:
            await ledger.add(one)
        assert [ledger.knows(one.id, "") for one in jobs] == [False, True, True, True]  # the last came on top

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_thread_that_was_given_up_touches_nothing_of_the_next_ones(tiny: Encoder) -> None:
    classifier = Classifier(tiny, LabelSet.parse(["dog", "cat"]))

    async def run() -> tuple[Job, Job]:
        loop, worker = asyncio.get_running_loop(), prober()
        begun, gate = threading.Event(), threading.Event()
        second = job(Target(classifier), ProbeOptions(eps=(64.0,), seconds=600), loop, 6)
        build = second.build

        def slow() -> Probe:
            begun.set()
            assert gate.wait(30)
            return build()

        second.build = slow
        other = threading.Thread(target=worker.step)  # of the next worker

        def hangs() -> Probe:
            worker.abandon()  # the supervisor, meanwhile
            worker.submit(second)
            other.start()
            assert begun.wait(30)
            raise RuntimeError("what a hung call says when it comes back")

        first = Job(hangs, loop, seconds=600)
        worker.submit(first)
        worker.step()
        assert (worker.running, worker.pending) == (1, True)  # it is being begun, and counts
        gate.set()
        other.join()
        await settle()
        while not second.ended:
            worker.step()
            await settle()
        return first, second

    first, second = asyncio.run(asyncio.wait_for(run(), 60))
    assert (first.status, type(first.error)) == ("failed", NotReady)
    assert (second.status, second.error) == ("done", None)
