"""Who is let in, in which order work is done, and how long it is said to take."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ironclip.errors import DeadlineExceeded, NotReady, OutOfMemory, Overloaded
from service import urgency
from service.admission import Admission
from service.batching import Batcher
from service.pace import Pace
from service.single_flight import SingleFlight
from service.urgency import BATCH, INTERACTIVE, Urgency, rank_of
from service.work_queue import Entry, WorkQueue
from tests.service.test_batching import Model, hold, running, until


def test_pace_knows_that_a_batch_is_cheaper_than_its_items() -> None:
    pace = Pace()
    assert pace.seconds(10) == 0  # nothing is known
    for size, seconds in ((1, 0.04), (4, 0.07), (8, 0.10), (8, 0.30)):  # the first of a size may set things up
        pace.measured(size, seconds)
    assert pace.seconds(0) == 0
    assert pace.seconds(1) == pytest.approx(0.04)
    assert pace.seconds(6) == pytest.approx(0.085)  # between its neighbours
    assert pace.seconds(8) == pytest.approx(0.10)
    assert pace.seconds(20) == pytest.approx(2 * 0.10 + 0.07)
    for _ in range(40):  # the machine has become half as fast, as batches of one size tell
        pace.observe(1, 0.08)
    assert pace.seconds(8) == pytest.approx(0.20, rel=0.01)


def test_one_stray_batch_does_not_upset_the_pace() -> None:
    pace = Pace()
    pace.measured(1, 0.01)
    pace.observe(1, 100.0)
    assert pace.seconds(1) < 0.02
    pace.observe(1, 0.0)  # a clock that stood still
    assert pace.seconds(1) > 0.01


def test_without_measurements_time_grows_with_the_items() -> None:
    pace = Pace()
    pace.observe(4, 0.2)
    assert pace.seconds(10) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("header", "rank"),
    [
        ("", INTERACTIVE),
        ("u=0", INTERACTIVE),
        ("u=3, i", INTERACTIVE),
        ("u=4", BATCH),
        ("i, u=7", BATCH),
        ("u=7, u=1", INTERACTIVE),  # the last one counts (RFC 8941)
        ("u=9", INTERACTIVE),
        ("u=-1", INTERACTIVE),
        ("nonsense u=7", INTERACTIVE),
        ("u=5;x", BATCH),
        ("u" * 100_000, INTERACTIVE),
    ],
)
def test_priority_header(header: str, rank: int) -> None:
    assert rank_of(header) == rank


@given(
    st.lists(
        st.tuples(st.sampled_from([INTERACTIVE, BATCH]), st.integers(0, 5), st.integers(1, 4), st.booleans()),
        max_size=40,
    ),
    st.integers(1, 8),
)
def test_order_is_by_class_then_deadline_and_nothing_is_lost(
    given_entries: list[tuple[int, int, int, bool]], most: int
) -> None:
    loop = asyncio.new_event_loop()
    queue: WorkQueue[int] = WorkQueue()
    now, kept = time.monotonic(), []
    for number, (rank, deadline, cost, gone) in enumerate(given_entries):
        entry = Entry(number, loop.create_future(), cost, Urgency(rank, now + 1000 + deadline))
        identity = queue.add(entry)
        if gone:
            queue.discard(identity)
        else:
            kept.append((rank, deadline, number))
    seen = []
    while len(queue):
        taken, expired = queue.take(most)
        assert not expired
        assert len(taken) == 1 or sum(entry.cost for entry in taken) <= most
        seen += [entry.item for entry in taken]
    assert seen == [number for _, _, number in sorted(kept)]
    assert queue.cost() == 0
    loop.close()


def test_late_batch_work_gets_a_share_and_no_more() -> None:
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue(patience=0.0)
    for _ in range(40):
        queue.add(Entry("interactive", loop.create_future(), 1, Urgency(INTERACTIVE, math.inf)))
        queue.add(Entry("batch", loop.create_future(), 1, Urgency(BATCH, math.inf)))
    time.sleep(0.001)
    taken, _ = queue.take(16)
    assert [entry.item for entry in taken].count("batch") == 2
    loop.close()


@pytest.mark.parametrize(("most", "cost"), [(16, 1), (16, 16), (4, 30), (1, 1)])
def test_late_batch_work_gets_no_more_than_its_share_whatever_it_costs(most: int, cost: int) -> None:
    """One of eight, of batches that one item of it would fill too."""
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue(patience=0.0)
    for _ in range(60):
        queue.add(Entry("batch", loop.create_future(), cost, Urgency(BATCH, math.inf)))
    time.sleep(0.001)
    done = {"interactive": 0, "batch": 0}
    for _ in range(200):
        while queue.cost(INTERACTIVE) < 2 * most:
            queue.add(Entry("interactive", loop.create_future(), 1, Urgency(INTERACTIVE, math.inf)))
        for entry in queue.take(most)[0]:
            done[entry.item] += entry.cost
        if not queue.cost() - queue.cost(INTERACTIVE):
            break
    share = done["batch"] / sum(done.values())
    assert 0.05 < share <= 0.16
    loop.close()


def test_work_without_a_deadline_is_not_overtaken_for_ever() -> None:
    """The texts of a label set, which belong to all who wait for it, beside a stream of requests with deadlines."""
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue(patience=5.0)
    queue.add(Entry("label set", loop.create_future(), 1, Urgency(INTERACTIVE, math.inf)))
    entries_of(loop, queue, early=1.0, **dict.fromkeys("abcdef", 30.0))
    assert named(queue.take(2)[0]) == ["early", "label set"]
    # And it is never given up.
    queue.add(Entry("label set", loop.create_future(), 1, Urgency(INTERACTIVE, math.inf)))
    taken, expired = queue.take(32, lambda items: 100.0 * items)
    assert named(taken) == ["label set"]
    assert "label set" not in named(expired)
    loop.close()


def test_who_would_be_overtaken_is_not_ahead() -> None:
    queue: WorkQueue[str] = WorkQueue()
    loop = asyncio.new_event_loop()
    entries_of(loop, queue, **dict.fromkeys("abcdefgh", 30.0), soon=0.3)
    queue.add(Entry("batch", loop.create_future(), 4, Urgency(BATCH, time.monotonic() + 1)))
    now = time.monotonic()
    assert queue.before(Urgency(INTERACTIVE, now + 0.5)) == 1
    assert queue.before(Urgency(INTERACTIVE, now + 40)) == queue.before(Urgency(INTERACTIVE)) == 9
    assert queue.before(Urgency(BATCH, now + 0.5)) == 9
    assert queue.before(Urgency(BATCH)) == 13
    pace = Pace()
    pace.measured(1, 0.1)
    door: Admission[str] = Admission("image", queue, pace, max_batch=1, max_queue=10, max_wait=0.5)
    context = contextvars.copy_context()
    context.run(urgency.CURRENT.set, Urgency(INTERACTIVE, now + 0.5))
    context.run(door.admit, 1, 0.0)
    # One who has as much time as the others waits behind them, and is told so.
    context.run(urgency.CURRENT.set, Urgency(INTERACTIVE, now + 30.5))
    with pytest.raises(Overloaded, match="900 ms of work are ahead"):
        context.run(door.admit, 1, 0.0)
    # Batch work does not fill the queue for those who go before it.
    for _ in range(10):
        queue.add(Entry("batch", loop.create_future(), 1, Urgency(BATCH, now + 30)))
    context.run(urgency.CURRENT.set, Urgency(INTERACTIVE, now + 0.5))
    context.run(door.admit, 1, 0.0)
    context.run(urgency.CURRENT.set, Urgency(BATCH, now + 0.5))
    with pytest.raises(Overloaded, match="IRONCLIP_MAX_QUEUE"):
        context.run(door.admit, 1, 0.0)
    loop.close()


def test_on_a_restless_machine_more_is_kept_in_hand() -> None:
    calm, restless = Pace(), Pace()
    for pace in (calm, restless):
        pace.measured(1, 0.1)
    for i in range(40):
        calm.observe(1, 0.1)
        restless.observe(1, 0.05 if i % 2 else 0.2)
    assert calm.surely(1) == pytest.approx(0.11)
    assert 0.2 <= restless.surely(1) <= 3 * restless.seconds(1)
    assert restless.seconds(1) == pytest.approx(0.1, rel=0.2)


def entries_of(loop: asyncio.AbstractEventLoop, queue: WorkQueue[str], **left: float) -> None:
    """Add one entry for each name, with so many seconds left."""
    for name, seconds in left.items():
        queue.add(Entry(name, loop.create_future(), 1, Urgency(INTERACTIVE, time.monotonic() + seconds)))


def named(entries: list[Entry[str]]) -> list[str]:
    return [entry.item for entry in entries]


def test_a_batch_is_no_larger_than_its_deadlines_allow() -> None:
    """At 0.1 s an item: five end in half a second, the sixth would make all of them late."""
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue()
    entries_of(loop, queue, a=0.55, b=0.56, c=0.57, d=0.58, e=0.59, f=0.95, g=50.0)
    assert queue.earliest() == pytest.approx(time.monotonic() + 0.55, abs=0.05)
    taken, expired = queue.take(32, lambda items: 0.1 * items)
    assert (named(taken), named(expired)) == (["a", "b", "c", "d", "e"], [])
    taken, expired = queue.take(32, lambda items: 0.1 * items)
    assert (named(taken), named(expired)) == (["f", "g"], [])
    assert queue.earliest() == math.inf
    loop.close()


def test_what_will_be_late_makes_way_and_is_tried_alone_where_all_is() -> None:
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue()
    entries_of(loop, queue, late=0.05, later=0.06, fine=5.0)
    taken, expired = queue.take(32, lambda items: 0.1 * items)
    assert (named(taken), named(expired)) == (["fine"], ["late", "later"])
    entries_of(loop, queue, a=0.03, b=0.08, c=0.05)
    taken, expired = queue.take(32, lambda items: 0.1 * items)
    assert (named(taken), sorted(named(expired))) == (["b"], ["a", "c"])
    assert not len(queue)
    loop.close()


def test_who_keeps_batches_small_makes_way_where_not_all_can_be_in_time() -> None:
    """A batch costs 50 ms and 36 ms an item: one alone takes 86 ms, six together 266 ms."""

    def seconds(items: int) -> float:
        return 0.05 + 0.036 * items

    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue()
    # `a` alone could be in time, and would make one more of the last six late.
    entries_of(loop, queue, a=0.1, b=0.12, c=0.15, d=0.35, e=0.35, f=0.35, g=0.35, h=0.35, i=0.35)
    taken, expired = queue.take(32, seconds)
    assert (named(taken), named(expired)) == (list("defghi"), list("abc"))
    # All can be in time: the hasty one goes first, and alone.
    entries_of(loop, queue, hasty=0.1, **dict.fromkeys("abcdefgh", 2.0))
    taken, expired = queue.take(32, seconds)
    assert (named(taken), named(expired)) == (["hasty"], [])
    taken, expired = queue.take(32, seconds)
    assert (named(taken), named(expired)) == (list("abcdefgh"), [])
    # One that is lost anyway takes no other with it.
    entries_of(loop, queue, lost=0.03, hasty=0.1, **dict.fromkeys("abcdefgh", 2.0))
    taken, expired = queue.take(32, seconds)
    assert (named(taken), named(expired)) == (["hasty"], ["lost"])
    assert len(queue) == 8
    loop.close()


def test_what_is_larger_than_a_batch_is_not_given_up_for_that() -> None:
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue()
    queue.add(Entry("large", loop.create_future(), 9, Urgency(INTERACTIVE, time.monotonic() + 1.0)))
    entries_of(loop, queue, a=1.5, late=0.01)
    taken, expired = queue.take(4, lambda items: 0.1 * items)
    assert (named(taken), named(expired)) == (["large"], ["late"])
    taken, expired = queue.take(4, lambda items: 0.1 * items)
    assert (named(taken), named(expired)) == (["a"], [])
    loop.close()


def test_items_that_nobody_waits_for_are_not_given_up_but_forgotten() -> None:
    loop = asyncio.new_event_loop()
    queue: WorkQueue[str] = WorkQueue()
    entries_of(loop, queue, a=0.1, b=0.12, c=0.15, **dict.fromkeys("defghi", 0.35))
    for entry in list(queue._entries.values())[:2]:
        entry.future.cancel()
    taken, expired = queue.take(32, lambda items: 0.05 + 0.036 * items)
    assert (named(taken), named(expired)) == (list("defghi"), ["c"])
    assert not len(queue)
    assert queue.cost() == 0
    loop.close()


async def as_request(rank: int, deadline: float, work: Callable[[], object]) -> object:
    """Run in a context of its own, as a request does."""
    urgency.CURRENT.set(Urgency(rank, deadline))
    return work()


@pytest.mark.parametrize("count", [1, 5])
def test_the_same_rule_for_one_item_and_for_many(count: int) -> None:
    """What is ahead decides, not what is brought (R6)."""

    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=1, max_wait=0.5) as batcher:
            batcher.pace.measured(1, 0.1)
            held = await hold(model, batcher, 100)
            waiting: list[asyncio.Task[list[int | Exception]]] = []
            while batcher.ahead_seconds(BATCH) <= 0.5:
                waiting.append(asyncio.create_task(batcher.submit_many(range(count))))
                await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await batcher.submit_many(range(count))
            assert caught.value.limit_name == "queue-ms"
            assert caught.value.limit == 500
            assert "IRONCLIP_MAX_QUEUE_MS" in caught.value.detail
            assert caught.value.retry_after is not None
            assert 0 < caught.value.retry_after <= batcher.ahead_seconds(BATCH)
            assert batcher.queued <= 5 + count  # half a second of work, and what the last one brought
            model.gate.set()
            await asyncio.gather(held, *waiting)

    asyncio.run(scenario())


def test_a_burst_of_reservations_is_seen_before_any_item_is_there() -> None:
    async def scenario() -> None:
        with running(Model(), max_batch=2, max_wait=1.0) as batcher:
            batcher.pace.measured(1, 0.4)
            with batcher.reserve(2), batcher.reserve(2):
                with pytest.raises(Overloaded), batcher.reserve(1):
                    pass
                assert batcher.estimated_wait_seconds == pytest.approx(1.6)
            assert batcher.estimated_wait_seconds == 0  # given back
            with batcher.reserve(3) as room:
                assert await batcher.submit_many([1, 2], room) == [1, 4]
                assert batcher.estimated_wait_seconds == pytest.approx(0.4, rel=0.9)  # one has not come
            assert batcher.estimated_wait_seconds == 0

    asyncio.run(scenario())


def test_a_deadline_that_cannot_be_kept_is_refused_and_one_that_passes_is_dropped() -> None:
    async def scenario() -> None:
        model = Model()
        expired: list[int] = []
        with running(model, max_batch=1, max_wait=60) as batcher:
            batcher.on_expired = expired.append
            batcher.pace.measured(1, 0.5)
            held = await hold(model, batcher, 7)
            now = time.monotonic()
            for seconds in (0.2, 0.8):  # what is ahead takes longer, or that and the request's own time
                with pytest.raises(Overloaded) as caught:
                    await as_request(INTERACTIVE, now + seconds, lambda: batcher._enqueue([1]))
                assert caught.value.limit_name == "deadline"
            (late,) = await asyncio.create_task(as_request(INTERACTIVE, now + 1.5, lambda: batcher._enqueue([2])))  # type: ignore[misc]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(late.future), 1.6)
            model.gate.set()
            await held
            with pytest.raises(DeadlineExceeded):
                await late.future
        assert model.batches == [[7]]  # what came too late was never begun
        assert expired == [1]

    asyncio.run(scenario())


def test_what_is_given_up_before_its_deadline_is_told_why_and_when_to_come_again() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=1, max_wait=600) as batcher:
            batcher.pace.measured(1, 10)
            held = await hold(model, batcher, 7)
            now = time.monotonic()
            (late,) = await asyncio.create_task(as_request(INTERACTIVE, now + 60, lambda: batcher._enqueue([2])))  # type: ignore[misc]
            (other,) = await asyncio.create_task(as_request(INTERACTIVE, math.inf, lambda: batcher._enqueue([3])))  # type: ignore[misc]
            for _ in range(20):  # the machine has become far slower
                batcher.pace.observe(1, 1000)
            model.gate.set()
            assert (await held, await other.future) == (49, 9)
            with pytest.raises(DeadlineExceeded, match=r"given up, not begun.*X-Request-Timeout-Ms") as caught:
                await late.future
            assert caught.value.unbegun
            assert caught.value.retry_after is not None
            assert caught.value.retry_after > 10

    asyncio.run(scenario())


def test_interactive_work_goes_first_and_does_not_wait_for_batch_work() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=2, max_wait=1.0) as batcher:
            batcher.pace.measured(1, 0.15)
            held = await hold(model, batcher, 100)

            async def ask(rank: int, items: list[int]) -> None:
                urgency.CURRENT.set(Urgency(rank))
                await batcher.submit_many(items)

            tasks = [asyncio.create_task(ask(BATCH, [10, 11, 12, 13, 14, 15, 16]))]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):  # there is more than a second of work ahead of batch work
                await ask(BATCH, [20])
            tasks.append(asyncio.create_task(ask(INTERACTIVE, [1, 2])))
            await until(lambda: batcher.queued == 9)
            model.gate.set()
            await asyncio.gather(held, *tasks)
        assert model.batches[1] == [1, 2]

    asyncio.run(scenario())


def test_no_memory_halves_what_fits_by_what_items_cost() -> None:
    async def scenario() -> None:
        def run(items: list[int]) -> list[int]:
            if sum(items) > 20:
                raise MemoryError
            return list(items)

        with running(run, max_batch=32, cost=lambda item: item) as batcher:
            assert await batcher.submit_many([16, 16]) == [16, 16]
            assert batcher.fits == 16

    asyncio.run(scenario())


def test_no_memory_makes_batches_smaller_and_larger_again_later() -> None:
    async def scenario() -> None:
        most, batches = 4, []

        def run(items: list[int]) -> list[int]:
            batches.append(len(items))
            if len(items) > most:
                raise MemoryError
            return list(items)

        with running(run, max_batch=16) as batcher:
            assert await batcher.submit_many(range(16)) == list(range(16))
            assert batcher.fits == 4
            batches.clear()
            assert await batcher.submit_many(range(16)) == list(range(16))
            assert set(batches) == {4}  # nothing is tried that is known not to fit
            most = 16
            for _ in range(60):
                await batcher.submit(1)
            assert batcher.fits == 8
            most = 0
            with pytest.raises(OutOfMemory):
                await batcher.submit(1)

    asyncio.run(scenario())


def test_a_supervised_worker_that_dies_loses_only_what_killed_it() -> None:
    async def scenario() -> None:
        batches: list[list[int]] = []

        def run(items: list[int]) -> list[int]:
            batches.append(list(items))
            if 3 in items:
                raise SystemExit("the device is gone")
            return [item * item for item in items]

        batcher: Batcher[int, int] = Batcher("test", run, max_batch=8, idle_wait_ms=0, supervised=True)
        batcher.start()
        tasks = [asyncio.create_task(batcher.submit(n)) for n in range(6)]
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not batcher.alive:
                if len(tasks) == 6:
                    tasks.append(asyncio.create_task(batcher.submit(9)))  # who comes now is not sent away
                await asyncio.sleep(0.01)
                batcher.start()
            if all(task.done() for task in tasks):
                break
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[3], NotReady)
        assert [outcome for i, outcome in enumerate(outcomes) if i != 3] == [0, 1, 4, 16, 25, 81]
        assert sum(3 in batch for batch in batches) == 2  # once among others, once alone
        await batcher.stop()

    asyncio.run(scenario())


def test_a_worker_that_hangs_is_replaced_and_what_waits_is_answered() -> None:
    async def scenario() -> None:
        model = Model()
        with running(model, max_batch=1) as batcher:
            held = await hold(model, batcher, 3)
            waiting = asyncio.create_task(batcher.submit(4))
            await until(lambda: batcher.queued == 1)
            await asyncio.sleep(0.05)
            assert batcher.hangs(0.04)
            assert not batcher.hangs(10)
            old, model.gate = model.gate, type(model.gate)()
            model.gate.set()
            batcher.replace()
            assert await waiting == 16
            with pytest.raises(NotReady, match="hung"):
                await held
            old.set()  # it comes back after all, and nobody hears it
            assert await batcher.submit(5) == 25
            assert not batcher.hangs(0.04)

    asyncio.run(scenario())


def test_work_that_is_shared_does_not_end_with_the_first_callers_deadline() -> None:
    async def scenario() -> None:
        flight, seen = SingleFlight(), []

        async def work() -> str:
            seen.append(urgency.CURRENT.get())
            await asyncio.sleep(0.01)
            return "done"

        async def ask(deadline: float) -> str:
            urgency.CURRENT.set(Urgency(BATCH, deadline))
            found = await flight.run("key", work)
            assert urgency.CURRENT.get().deadline == deadline  # its own is as it was
            return found

        assert await asyncio.gather(ask(1.0), ask(2.0)) == ["done", "done"]
        assert seen == [Urgency(BATCH, math.inf)]

    asyncio.run(scenario())
