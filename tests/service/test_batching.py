"""The batcher answers each item with its own result, whatever its neighbours, callers and worker do."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ironclip.errors import ImageInvalid, NotReady, Overloaded
from service import batching, waits
from service.attempts import Attempts
from service.batching import Batcher
from service.supervisor import Supervisor, Watched
from service.telemetry import Stages


class Model:
    """Squares numbers; can be held mid-batch, and raises on the items in `bad`."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.batches: list[list[int]] = []
        self.bad = set(bad)
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(10)
        guilty = self.bad & set(items)
        if guilty:
            raise ImageInvalid(f"bad {min(guilty)}")
        return [item * item for item in items]


@contextmanager
def running(model: Any, **options: Any) -> Iterator[Batcher[int, int]]:
    batcher: Batcher[int, int] = Batcher("test", model, **{"idle_wait_ms": 0, **options})
    batcher.start()
    try:
        yield batcher
    finally:
        if isinstance(model, Model):
            model.gate.set()
        stopper = threading.Thread(target=lambda: asyncio.run(batcher.stop(drain=False)))
        stopper.start()
        stopper.join()
        assert not batcher.alive


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def hold(model: Model, batcher: Batcher[int, int], item: int = 0) -> asyncio.Task[int]:
    """Occupy the worker with one item and keep it there."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(item))
    await until(lambda: model.batches[-1:] == [[item]] and batcher.busy)
    return task


def test_batch_grows_while_the_device_is_busy_and_is_one_when_idle() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=8) as batcher:
            assert await batcher.submit(3) == 9
            held = await hold(model, batcher, 5)
            rest = [asyncio.create_task(batcher.submit(n)) for n in range(20)]
            await until(lambda: batcher.queued == 20)
            assert batcher.busy
            model.gate.set()
            assert await held == 25
            assert await asyncio.gather(*rest) == [n * n for n in range(20)]
        assert model.batches == [[3], [5], list(range(8)), list(range(8, 16)), list(range(16, 20))]

    asyncio.run(scenario())


@pytest.mark.parametrize("answered", [True, False])
def test_what_waits_for_its_turn_is_told_apart_from_what_is_computed(answered: bool) -> None:
    async def scenario() -> None:
        model, stages = Model(), Stages()

        async def ask() -> None:
            with stages.time("model"):
                await batcher.submit_many([2, 3])

        with running(model, max_batch=8) as batcher:
            held = await hold(model, batcher, 1)
            asked = asyncio.create_task(ask())
            await until(lambda: batcher.queued == 2)
            await asyncio.sleep(0.1)
            if answered:
                model.gate.set()
                await asked
                await held
            else:  # its caller's time is up
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
                model.gate.set()
                await held
        assert list(stages.seconds) == ["queue", "model"]
        assert stages.seconds["queue"] >= 0.1 > stages.seconds["model"] >= 0
        assert waits.CURRENT.get() is None

    asyncio.run(scenario())


def test_the_longest_wait_counts_and_where_nobody_waited_there_is_no_queue() -> None:
    stages = Stages()
    with stages.time("model"):
        pass
    assert list(stages.seconds) == ["model"]
    with stages.time("labels"):
        waits.note(5)  # banks are built for many: theirs is part of the labels
    assert list(stages.seconds) == ["model", "labels"]

    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=1) as batcher:
            wait = waits.Wait()
            token = waits.CURRENT.set(wait)
            model.gate.clear()
            asked = asyncio.create_task(batcher.submit_many([1, 2]))
            await until(lambda: model.batches == [[1]])
            await asyncio.sleep(0.05)
            model.gate.set()
            await asked
            waits.CURRENT.reset(token)
            assert wait.seconds is not None
            assert wait.seconds >= 0.05  # the second's

    asyncio.run(scenario())


def test_large_request_is_split_and_joined_in_order() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=4, max_queue=3) as batcher:
            assert await batcher.submit_many(range(11)) == [n * n for n in range(11)]  # more than the queue holds
            assert await batcher.submit_many([]) == []
        assert [len(batch) for batch in model.batches] == [4, 4, 3]

    asyncio.run(scenario())


@given(
    requests=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    bad=st.sets(st.integers(0, 100), max_size=12),
    cancelled=st.sets(st.integers(0, 11), max_size=4),
    pauses=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    max_batch=st.integers(1, 10),
    idle_wait_ms=st.sampled_from([0, 1]),
)
@settings(max_examples=80, deadline=None)
def test_any_interleaving_gives_each_item_its_own_outcome(
    requests: list[int],
    bad: set[int],
    cancelled: set[int],
    pauses: list[int],
    max_batch: int,
    idle_wait_ms: float,
) -> None:
    async def scenario() -> None:
        model = Model(list(bad))
        with running(model, max_batch=max_batch, idle_wait_ms=idle_wait_ms) as batcher:
            tasks, first = [], 0
            for index, size in enumerate(requests):
                items = list(range(first, first + size))
                first += size
                tasks.append((items, asyncio.create_task(batcher.submit_many(items))))
                for _ in range(pauses[index]):
                    await asyncio.sleep(0)
                if index in cancelled:
                    tasks[-1][1].cancel()
            await asyncio.wait([task for _, task in tasks])
            for index, (items, task) in enumerate(tasks):
                if index in cancelled and task.cancelled():
                    continue
                for item, outcome in zip(items, task.result(), strict=True):
                    if item in bad:
                        assert isinstance(outcome, ImageInvalid)
                        assert outcome.detail == f"bad {item}"
                    else:
                        assert outcome == item * item
            assert batcher.queued == 0
            assert batcher.stalled_seconds == 0
        assert all(1 <= len(batch) <= max_batch for batch in model.batches)
        firsts = [batch[0] for batch in model.batches if not bad & set(batch)]
        assert firsts == sorted(firsts)  # first come, first served

    asyncio.run(scenario())


def test_only_the_guilty_fail_and_reruns_are_few() -> None:
    async def scenario() -> None:
        model = Model([3, 4, 30])
        with running(model, max_batch=32) as batcher:
            held = await hold(model, batcher, 100)
            task = asyncio.create_task(batcher.submit_many(range(32)))
            await until(lambda: batcher.queued == 32)
            model.gate.set()
            outcomes = await task
            assert await held == 10_000
        assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Exception)] == [3, 4, 30]
        assert len(model.batches) - 1 <= 1 + 2 * 3 * 5  # halving: at most 2 log2(32) runs for each bad item

    asyncio.run(scenario())


@pytest.mark.parametrize("stage", ["waiting", "running", "answered"])
def test_a_cancelled_caller_disturbs_nobody(stage: str) -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=4) as batcher:
            held = await hold(model, batcher, 7)
            others = [asyncio.create_task(batcher.submit(n)) for n in range(3)]
            await until(lambda: batcher.queued == 3)
            victim = {"waiting": others[1], "running": held, "answered": others[1]}[stage]
            if stage != "answered":
                victim.cancel()
                await until(lambda: batcher.queued == (2 if stage == "waiting" else 3))
            model.gate.set()
            if stage == "answered":
                await asyncio.wait([*others, held])
                victim.cancel()
            results = await asyncio.gather(held, *others, return_exceptions=True)
            expected: list[Any] = [49, 0, 1, 4]
            for index, task in enumerate([held, *others]):
                if task is victim and stage != "answered":
                    assert isinstance(results[index], asyncio.CancelledError)
                else:
                    assert results[index] == expected[index]
        assert (1 in model.batches[-1]) == (stage != "waiting")  # nobody's work is not done

    asyncio.run(scenario())


def test_a_workers_death_touches_no_future_from_its_thread() -> None:
    """A caller may be cancelled at that very moment, and an event loop takes nothing from another thread."""
    touched: list[int] = []

    class Watched(asyncio.Future[Any]):
        def add_done_callback(self, *args: Any, **more: Any) -> None:
            touched.append(threading.get_ident())
            super().add_done_callback(*args, **more)

    class Loop(asyncio.SelectorEventLoop):
        def create_future(self) -> asyncio.Future[Any]:
            return Watched(loop=self)

    gate, deaths = threading.Event(), 1

    def run(items: Sequence[int]) -> list[int]:
        nonlocal deaths
        assert gate.wait(10)
        if deaths:
            deaths -= 1
            raise SystemExit("the worker's thread ends")
        return [item * item for item in items]

    async def scenario() -> None:
        with running(run, supervised=True, max_batch=1) as batcher:
            tasks = [asyncio.create_task(batcher.submit_many([n])) for n in range(3)]
            await until(lambda: batcher.busy and batcher.queued == 2)
            gate.set()
            await until(lambda: not batcher.alive)
            tasks[0].cancel()  # of the batch that died, which would be tried again
            await until(lambda: batcher.queued == 2)
            batcher.start()
            assert await tasks[1] + await tasks[2] == [1, 4]

    loop = Loop()
    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()
    assert set(touched) == {threading.get_ident()}


def test_full_queue_refuses_whole_requests_and_says_when_to_come_back() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=2, max_queue=5) as batcher:
            held = await hold(model, batcher)
            await asyncio.sleep(0.02)
            model.gate.set()
            await held  # now a rate is known
            held = await hold(model, batcher)
            waiting = asyncio.create_task(batcher.submit_many(range(4)))
            await until(lambda: batcher.queued == 4)
            many = asyncio.create_task(batcher.submit_many([1, 2, 3]))  # what it brings itself does not count
            await until(lambda: batcher.queued == 7)
            for size in (1, 3):
                with pytest.raises(Overloaded) as caught:
                    await batcher.submit_many(range(size))
                assert caught.value.limit == 5
                assert caught.value.retry_after
                assert caught.value.retry_after > 0.02
            assert batcher.queued == 7  # nothing of them was taken
            many.cancel()  # gives its places back
            await until(lambda: batcher.queued == 4)
            again = asyncio.create_task(batcher.submit(8))
            await until(lambda: batcher.queued == 5)
            model.gate.set()
            assert await waiting == [0, 1, 4, 9]
            assert await again == 64
            await held

    asyncio.run(scenario())


def test_dead_worker_fails_those_who_wait_and_is_seen() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def run(items: Sequence[int]) -> list[int]:
            gate.wait(10)
            raise SystemExit("the device is gone")

        batcher: Batcher[int, int] = Batcher("test", run, max_batch=2, idle_wait_ms=0)
        with pytest.raises(NotReady):
            await batcher.submit(1)  # not started
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit(n)) for n in range(5)]
        await until(lambda: batcher.busy)
        assert batcher.alive
        gate.set()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, NotReady)
        await until(lambda: not batcher.alive)
        with pytest.raises(NotReady):
            await batcher.submit(1)
        await batcher.stop()

    asyncio.run(scenario())


def test_a_stuck_worker_shows_as_stalled() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model) as batcher:
            assert batcher.stalled_seconds == 0
            held = await hold(model, batcher)
            await asyncio.sleep(0.02)
            assert batcher.stalled_seconds >= 0.02
            model.gate.set()
            await held
            assert batcher.stalled_seconds == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_drains_or_refuses_what_waits(drain: bool) -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=2) as batcher:
            held = await hold(model, batcher, 6)
            waiting = asyncio.create_task(batcher.submit_many(range(5)))
            await until(lambda: batcher.queued == 5)
            stopping = asyncio.create_task(batcher.stop(drain=drain))
            await asyncio.sleep(0)
            with pytest.raises(NotReady):
                await batcher.submit(1)
            model.gate.set()
            await stopping
            assert await held == 36
            outcomes = await waiting
            if drain:
                assert outcomes == [0, 1, 4, 9, 16]
            else:
                assert all(isinstance(outcome, NotReady) for outcome in outcomes)

    asyncio.run(scenario())


def test_wrong_number_of_results_is_an_error_for_all_and_garbage_for_none() -> None:
    async def scenario() -> None:
        with running(lambda items: [1, 2, 3], max_batch=2) as batcher:
            with pytest.raises(RuntimeError, match="3 results for 1 items"):
                await batcher.submit(1)
            assert batcher.alive

    asyncio.run(scenario())


def test_a_callers_closed_loop_and_a_failing_observer_do_not_matter() -> None:
    model = Model()

    def observe(size: int, seconds: float, queue_seconds: float) -> None:
        raise ValueError("observer")

    with running(model, max_batch=4, on_batch=observe) as batcher:

        async def leave() -> None:
            await hold(model, batcher, 1)
            asyncio.get_running_loop().call_soon(lambda: batcher._enqueue([2]))
            await until(lambda: batcher.queued == 1)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.close()  # without running the cancelled tasks: their futures stay
        model.gate.set()
        assert asyncio.run(batcher.submit(3)) == 9
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(asyncio.run(batcher.submit(n)))) for n in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [0, 1, 4, 9, 16]  # many loops at once
        assert batcher.alive


def test_idle_wait_gathers_company_only_where_some_is_expected() -> None:
    async def scenario(expected: bool) -> list[list[int]]:
        model = Model()
        with running(model, max_batch=3, idle_wait_ms=1000, more_expected=lambda: expected) as batcher:
            first = asyncio.create_task(batcher.submit(0))
            await asyncio.sleep(0.02)
            began = time.monotonic()
            await asyncio.gather(first, batcher.submit(1), batcher.submit(2))
            assert time.monotonic() - began < 0.9  # a full batch does not wait on
        return model.batches

    assert asyncio.run(scenario(True)) == [[0, 1, 2]]
    assert asyncio.run(scenario(False))[0] == [0]


def test_on_shared_cores_a_batch_waits_for_what_is_being_prepared() -> None:
    async def scenario() -> None:
        model, preparing = Model(), True
        options: dict[str, Any] = {"max_batch": 8, "idle_wait_ms": 200, "more_expected": lambda: preparing}
        with running(model, shares_cores=True, **options) as batcher:
            first = asyncio.create_task(batcher.submit(0))
            await asyncio.sleep(0.6)  # longer than an idle worker waits for the next item
            assert model.batches == []
            second = asyncio.create_task(batcher.submit(1))
            await asyncio.sleep(0.02)
            preparing = False
            await asyncio.gather(first, second)
            assert model.batches == [[0, 1]]
            # Two callers were answered; when one is back, the other is given a moment.
            began = time.monotonic()
            await batcher.submit(2)
            assert time.monotonic() - began > 0.18
            # Only one came, so one is what is expected from now on.
            began = time.monotonic()
            await batcher.submit(3)
            assert time.monotonic() - began < 0.18
            preparing = True
            began = time.monotonic()
            await batcher.submit(4)
            assert 1.2 < time.monotonic() - began < 6  # something that never comes is not waited for long

    asyncio.run(scenario())


def test_smallest_knobs_work_and_observers_see_batches() -> None:
    async def scenario() -> None:
        seen: list[tuple[int, float, float]] = []
        with running(Model(), max_batch=1, max_queue=1, on_batch=lambda *report: seen.append(report)) as batcher:
            for n in range(4):
                assert await batcher.submit(n) == n * n
            await until(lambda: len(seen) == 4)
        assert all(size == 1 and seconds >= 0 and waited >= 0 for size, seconds, waited in seen)
        for bad in ({"max_batch": 0}, {"max_queue": 0}, {"idle_wait_ms": -1}):
            with pytest.raises(ValueError, match="at least"):
                Batcher("bad", Model(), **bad)

    asyncio.run(scenario())


def test_items_are_weighed_in_batches_and_in_the_queue() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=4, max_queue=12, cost=lambda item: item) as batcher:
            held = await hold(model, batcher, 1)
            waiting = asyncio.create_task(batcher.submit_many([2, 2, 3, 5]))
            await until(lambda: batcher.queued == 12)
            with pytest.raises(Overloaded):
                await batcher.submit(1)
            model.gate.set()
            assert await waiting == [4, 4, 9, 25]
            await held
        assert model.batches == [[1], [2, 2], [3], [5]]  # one that costs more than a batch goes alone

    asyncio.run(scenario())


class Beside:
    """Endless work between batches, in pieces of twenty milliseconds."""

    urgent = False

    def __init__(self) -> None:
        self.pieces = 0
        self.pending = True

    def step(self) -> None:
        self.pieces += 1
        time.sleep(0.02)


def test_work_between_batches_waits_for_what_is_about_to_come() -> None:
    beside, coming = Beside(), True
    with running(Model(), gaps=beside, more_expected=lambda: coming) as batcher:

        async def ask() -> tuple[int, int]:
            await asyncio.sleep(0.2)
            before = beside.pieces
            return before, await batcher.submit(3)

        before, answer = asyncio.run(ask())
        assert (before, answer) == (1, 9)  # one piece in a while is run all the same
        coming = False
        deadline = time.monotonic() + 5
        while beside.pieces < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        beside.pending = False


@pytest.mark.parametrize("fault", [MemoryError, ValueError])
def test_what_a_failed_batch_had_in_hand_is_gone_before_its_halves_run(fault: type[Exception]) -> None:
    """Else a half would have to find room beside it, and a batch that fits would seem too large."""
    hands: list[weakref.ref[Any]] = []
    beside: list[int] = []

    def held() -> int:
        return sum(hand() is not None for hand in hands)

    def run(items: Sequence[int]) -> list[int]:
        beside.append(held())
        hand = torch.zeros(1)  # a local of the frame that raises
        hands.append(weakref.ref(hand))
        if len(items) > 1:
            raise fault("too large")
        return [int(hand.sum()) + item for item in items]

    freed: list[int] = []
    gc.disable()
    try:
        attempts = Attempts("test", run, 8, None, free_memory=lambda: freed.append(held()))
        assert attempts.run(list(range(8))) == list(range(8))
    finally:
        gc.enable()
    assert beside == [0] * 15
    assert freed == ([0] * 7 if fault is MemoryError else [])


def test_a_stop_answers_what_a_hanging_worker_had_and_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_HANG", 0.2)

    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=1) as batcher:
            held = await hold(model, batcher, 6)
            waiting = asyncio.create_task(batcher.submit(7))
            await until(lambda: batcher.queued == 1)
            await asyncio.wait_for(batcher.stop(drain=True), 10)
            for task in (held, waiting):
                with pytest.raises(NotReady):
                    await asyncio.wait_for(task, 1)
            model.gate.set()  # it comes back, and is not heard
            await until(lambda: not batcher.alive)
            assert model.batches == [[6]]

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_replaced_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, supervised=True) as batcher:
            held = await hold(model, batcher, 6)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", no_thread)
                with pytest.raises(RuntimeError):
                    batcher.replace()
            with pytest.raises(NotReady):
                await asyncio.wait_for(held, 1)
            model.gate.set()
            await until(lambda: not batcher.alive)
            batcher.start()
            assert await batcher.submit(5) == 25

    asyncio.run(scenario())


def test_a_supervisor_outlives_a_system_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        def dies(items: Sequence[int]) -> list[int]:
            if 13 in items:
                raise SystemExit
            return list(items)

        with running(dies, supervised=True) as batcher:
            given_up: list[str] = []
            supervisor = Supervisor(hang_seconds=60, restarts=5, on_given_up=given_up.append)

            async def check() -> int:
                return await batcher.submit(1)

            supervisor.watch(Watched(batcher, "test", "image", check))
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", no_thread)
                supervisor.start()
                last = asyncio.create_task(batcher.submit(13))
                await asyncio.sleep(0.6)
            with pytest.raises(NotReady):  # it was tried once more, alone
                await asyncio.wait_for(last, 10)
            deadline = time.monotonic() + 10
            while not batcher.alive:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            assert await batcher.submit(4) == 4
            assert not given_up
            supervisor.stop()

    asyncio.run(scenario())


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
