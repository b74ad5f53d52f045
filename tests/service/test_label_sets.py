"""Registered label sets over both stores: versions, preconditions, and what a second replica sees."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis as sync_redis

from ironclip.errors import Conflict, LabelError, LabelSetNotFound, TreeError, Unavailable
from ironclip.labels import LabelLimits
from service import label_sets
from service.errors import LabelSetReadOnly, TooManyLabelSets
from service.label_sets import LabelSets, load_built_in, parse_document
from service.label_stores import KEPT_VERSIONS, Expect, FileStore, RedisStore
from service.redis_link import RedisLink
from tests.service.conftest import RedisServer

pytestmark = pytest.mark.anyio
Replica = Callable[[], Awaitable[LabelSets]]
ANY = Expect()


@pytest.fixture(params=["files", "redis"])
async def replica(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Replica]:
    """Make replicas over one store."""
    links: list[RedisLink] = []
    built_in = {"shipped": parse_document("shipped", {"labels": ["a", "b"]}, read_only=True)}
    server: RedisServer | None = None
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")

    async def make() -> LabelSets:
        if server is None:
            return LabelSets(FileStore(tmp_path), built_in, LabelLimits(labels=50))
        link = RedisLink(server.url, 0.5)
        await link.start()
        links.append(link)
        return LabelSets(RedisStore(link, "test"), built_in, LabelLimits(labels=50))

    yield make
    for link in links:
        await link.close()


async def test_a_set_comes_back_in_canonical_form(replica: Replica) -> None:
    sets = await replica()
    entry, created = await sets.put("pets", {"labels": [" cat ", {"name": "dog"}], "templates": ["a {}"]}, ANY)
    assert created
    back = await (await replica()).get("pets")
    assert back.digest == entry.digest == back.label_set.digest
    assert back.document() == {"labels": ["cat", "dog"], "templates": ["a {}"]}


async def test_the_same_content_has_the_same_digest_and_other_content_another(replica: Replica) -> None:
    sets = await replica()
    first, _ = await sets.put("pets", {"labels": ["cat", "dog"]}, ANY)
    again, created = await sets.put("pets", {"labels": [" cat", "dog "]}, ANY)
    other, _ = await sets.put("pets", {"labels": ["dog", "cat"]}, ANY)
    assert (again.digest, created) == (first.digest, False)
    assert other.digest != first.digest


async def test_a_pinned_version_outlives_the_next(replica: Replica) -> None:
    sets = await replica()
    old, _ = await sets.put("pets", {"labels": ["cat", "dog"]}, ANY)
    await sets.put("pets", {"labels": ["cat", "dog", "newt"]}, ANY)
    other = await replica()
    assert len((await other.get("pets")).label_set) == 3
    assert (await other.get(f"pets@{old.digest}")).label_set.names == ("cat", "dog")
    with pytest.raises(LabelSetNotFound):
        await other.get("pets@" + "0" * 64)


async def test_old_versions_go_and_the_newest_stay(replica: Replica) -> None:
    sets = await replica()
    digests = [(await sets.put("pets", {"labels": [f"x{i}"]}, ANY))[0].digest for i in range(KEPT_VERSIONS + 3)]
    other = await replica()
    with pytest.raises(LabelSetNotFound):
        await other.get(f"pets@{digests[0]}")
    assert (await other.get(f"pets@{digests[-2]}")).digest == digests[-2]


async def test_all_sets_together_are_bounded_in_bytes(redis_server: RedisServer, tmp_path: Path) -> None:
    """Older versions make way; a set that there is no room for is refused, and room comes back with a deletion."""
    link = RedisLink(redis_server.url, 0.5)
    await link.start()

    def document(name: str) -> dict[str, object]:
        return {"labels": [f"{name} {'x' * 30} {number}" for number in range(50)]}

    for store in (FileStore(tmp_path, max_bytes=8500), RedisStore(link, "bytes", max_bytes=8500)):
        sets = LabelSets(store, {}, LabelLimits())
        digests = [(await sets.put("one", document(f"v{version}"), ANY))[0].digest for version in range(4)]
        fresh = LabelSets(store, {}, LabelLimits())
        assert (await fresh.get(f"one@{digests[3]}")).digest == digests[3]
        assert (await fresh.get(f"one@{digests[2]}")).digest == digests[2]
        with pytest.raises(LabelSetNotFound):  # two of some 2,000 bytes are not yet half
            await fresh.get(f"one@{digests[1]}")
        await sets.put("two", document("two"), ANY)
        with pytest.raises(TooManyLabelSets, match="IRONCLIP_MAX_LABEL_SET_BYTES"):
            await sets.put("three", {"labels": [f"{'y' * 90} {number}" for number in range(50)]}, ANY)
        await sets.put("one", {"labels": ["short"]}, ANY)
        await sets.delete("two", ANY)
        await sets.put("three", {"labels": [f"{'y' * 90} {number}" for number in range(50)]}, ANY)
    await link.close()


async def test_preconditions(replica: Replica) -> None:
    sets, other = await replica(), await replica()
    first, _ = await sets.put("pets", {"labels": ["a"]}, Expect(if_none_match=("*",)))
    with pytest.raises(Conflict):
        await other.put("pets", {"labels": ["b"]}, Expect(if_none_match=("*",)))
    second, _ = await other.put("pets", {"labels": ["b"]}, Expect(if_match=(first.digest,)))
    with pytest.raises(Conflict):
        await sets.put("pets", {"labels": ["c"]}, Expect(if_match=(first.digest,)))
    with pytest.raises(Conflict):
        await sets.delete("pets", Expect(if_match=(first.digest,)))
    with pytest.raises(Conflict):
        await sets.put("fresh", {"labels": ["c"]}, Expect(if_match=("*",)))
    await sets.delete("pets", Expect(if_match=(second.digest,)))


async def test_concurrent_creation_has_one_winner(replica: Replica) -> None:
    replicas = [await replica() for _ in range(4)]

    async def create(i: int) -> bool:
        try:
            await replicas[i].put("pets", {"labels": [f"x{i}"]}, Expect(if_none_match=("*",)))
        except Conflict:
            return False
        return True

    assert sum(await asyncio.gather(*map(create, range(4)))) == 1


async def test_deleted_is_gone_everywhere_within_a_second(replica: Replica) -> None:
    sets, other = await replica(), await replica()
    entry, _ = await sets.put("pets", {"labels": ["a"]}, ANY)
    await other.get("pets")
    await sets.delete("pets", ANY)
    await asyncio.sleep(0.6)
    for reference in ("pets",):
        for one in (sets, other):
            with pytest.raises(LabelSetNotFound):
                await one.get(reference)
    with pytest.raises(LabelSetNotFound):
        await sets.get(f"pets@{entry.digest}")
    with pytest.raises(LabelSetNotFound):
        await sets.delete("pets", ANY)
    assert [name for name, *_ in await sets.names()] == ["shipped"]


async def test_shipped_sets_are_there_and_read_only(replica: Replica) -> None:
    sets = await replica()
    assert (await sets.get("shipped")).label_set.names == ("a", "b")
    for change in (sets.put("shipped", {"labels": ["x"]}, ANY), sets.delete("shipped", ANY)):
        with pytest.raises(LabelSetReadOnly):
            await change
    await sets.put("mine", {"labels": ["x"]}, ANY)
    assert [(name, fixed) for name, _, fixed in await sets.names()] == [("mine", False), ("shipped", True)]


@pytest.mark.parametrize("name", ["", "A", "../x", "a/b", ".hidden", "x" * 65, "a b", "a@b", "ä", "current\n"])
async def test_a_name_never_becomes_a_path(replica: Replica, name: str, tmp_path: Path) -> None:
    sets = await replica()
    with pytest.raises(LabelError):
        await sets.put(name, {"labels": ["x"]}, ANY)
    with pytest.raises(LabelSetNotFound):
        await sets.get(name)
    assert not (tmp_path / "x").exists()


async def test_limits_hold_for_registered_sets(replica: Replica) -> None:
    with pytest.raises(LabelError, match="at most 50"):
        await (await replica()).put("many", {"labels": [str(i) for i in range(51)]}, ANY)


async def test_a_tree_travels_with_its_labels_and_counts_in_the_digest(replica: Replica) -> None:
    sets = await replica()
    plain, _ = await sets.put("pets", {"labels": ["cat", "dog"]}, ANY)
    tree = {"levels": ["name", "kind"], "parents": {"cat": "pet", "dog": "pet"}}
    entry, _ = await sets.put("pets", {"labels": ["cat", "dog"], "tree": tree}, ANY)
    assert entry.digest != plain.digest
    back = await (await replica()).get(f"pets@{entry.digest}")
    assert back.document()["tree"] == tree
    with pytest.raises(TreeError):
        await sets.put("pets", {"labels": ["cat", "newt"], "tree": tree}, ANY)


async def test_redis_lost_leaves_known_sets_in_use_and_says_so_for_others(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, 0.05)
    await link.start()
    sets = LabelSets(RedisStore(link, "test"), {}, LabelLimits())
    await sets.put("pets", {"labels": ["cat"]}, ANY)
    redis_server.kill()
    await asyncio.sleep(0.6)
    assert (await sets.get("pets")).label_set.names == ("cat",)
    with pytest.raises(Unavailable):
        await sets.get("others")
    with pytest.raises(Unavailable):
        await sets.put("pets", {"labels": ["dog"]}, ANY)
    await link.close()


async def test_only_so_many_names_are_kept(replica: Replica) -> None:
    replicas = [await replica() for _ in range(4)]
    for one in replicas:
        one.store.max_sets = 3  # type: ignore[attr-defined]

    async def create(i: int) -> str:
        try:
            await replicas[i % 4].put(f"pets{i}", {"labels": ["cat"]}, ANY)
        except TooManyLabelSets:
            return ""
        return f"pets{i}"

    kept = sorted(filter(None, await asyncio.gather(*map(create, range(8)))))
    assert len(kept) == 3
    assert [name for name, _, fixed in await replicas[0].names() if not fixed] == kept
    await replicas[0].put(kept[0], {"labels": ["newt"]}, ANY)  # another version is no further set
    await replicas[0].delete(kept[0], ANY)
    await replicas[1].put("after", {"labels": ["cat"]}, ANY)


@pytest.mark.parametrize("versions", [b"{not json", b"\xff", b"7", b'[1, {"a": 2}]', b"[" * 100_000])
async def test_a_damaged_list_of_versions_is_begun_anew(redis_server: RedisServer, versions: bytes) -> None:
    link = RedisLink(redis_server.url, 0.5)
    await link.start()
    sets = LabelSets(RedisStore(link, "test"), {}, LabelLimits())
    await sets.put("pets", {"labels": ["cat"]}, ANY)
    sync_redis.Redis.from_url(redis_server.url).hset("test:label-set:pets", "versions", versions)  # type: ignore[arg-type]
    await sets.put("pets", {"labels": ["dog"]}, ANY)
    assert (await sets.get("pets", fresh=True)).label_set.names == ("dog",)
    await link.close()


async def test_a_key_that_holds_something_else_spoils_one_name_only(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, 0.5)
    await link.start()
    sets = LabelSets(RedisStore(link, "test"), {}, LabelLimits())
    await sets.put("pets", {"labels": ["cat"]}, ANY)
    client = sync_redis.Redis.from_url(redis_server.url)
    client.set("test:label-set:poison", "x")
    client.sadd("test:label-sets", "poison")
    for _ in range(5):
        with pytest.raises(Unavailable, match="something else under this key"):
            await sets.get("poison")
        with pytest.raises(Unavailable, match="something else under this key"):
            await sets.put("poison", {"labels": ["dog"]}, ANY)
    assert link.available
    assert [name for name, *_ in await sets.names()] == ["pets"]
    assert (await sets.get("pets", fresh=True)).label_set.names == ("cat",)
    await link.close()


async def test_a_folder_that_cannot_be_written_is_an_error_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "label-sets").write_text("a file where a folder should be")
    sets = LabelSets(FileStore(tmp_path), {}, LabelLimits())
    with pytest.raises(Unavailable, match="IRONCLIP_STATE_DIR"):
        await sets.put("pets", {"labels": ["cat"]}, ANY)


async def test_a_damaged_file_is_not_taken_for_the_set(tmp_path: Path) -> None:
    sets = LabelSets(FileStore(tmp_path), {}, LabelLimits())
    entry, _ = await sets.put("pets", {"labels": ["cat"]}, ANY)
    path = tmp_path / "label-sets" / "pets" / f"{entry.digest}.json"
    for content in (b"", b"{", json.dumps({"labels": ["dog"]}).encode()):
        path.write_bytes(content)
        with pytest.raises(Unavailable, match="put it again"):
            await LabelSets(FileStore(tmp_path), {}, LabelLimits()).get("pets")


async def test_built_in_sets_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "pets.json").write_text('{"labels": ["cat"], "description": "for people"}')
    sets = load_built_in(tmp_path)
    assert sets["pets"].read_only
    assert sets["pets"].label_set.names == ("cat",)


class SlowToTell(FileStore):
    """Tells which version is the newest long after it has looked, where it is asked to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.hold: asyncio.Event | None = None
        self.looked = asyncio.Event()

    async def head(self, name: str) -> str | None:
        found, hold = await super().head(name), self.hold
        if hold is not None:
            self.looked.set()
            await hold.wait()
        return found


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("change", ["put", "delete"])
async def test_what_was_read_before_a_change_does_not_hide_it(tmp_path: Path, change: str, known: bool) -> None:
    store = SlowToTell(tmp_path)
    await LabelSets(store, {}, LabelLimits()).put("pets", {"labels": ["cat"]}, ANY)
    sets = LabelSets(store, {}, LabelLimits())
    if known:
        await sets.get("pets")
    store.hold = asyncio.Event()
    slow = asyncio.create_task(sets.get("pets", fresh=True))
    await store.looked.wait()
    hold, store.hold = store.hold, None
    if change == "delete":
        await sets.delete("pets", ANY)
    else:
        await sets.put("pets", {"labels": ["dog"]}, ANY)
    hold.set()
    await asyncio.gather(slow, return_exceptions=True)
    if change == "delete":
        with pytest.raises(LabelSetNotFound):
            await sets.get("pets")
    else:
        assert (await sets.get("pets")).label_set.names == ("dog",)


async def test_of_two_changes_at_once_the_one_that_came_last_is_known(tmp_path: Path) -> None:
    class SlowToWrite(FileStore):
        async def put(self, name: str, digest: str, document: bytes, expect: Expect) -> bool:
            created = await super().put(name, digest, document, expect)
            await asyncio.sleep(0.3 if b"cat" in document else 0)  # the answer is late, not the change
            return created

    sets = LabelSets(SlowToWrite(tmp_path), {}, LabelLimits())
    first = asyncio.create_task(sets.put("pets", {"labels": ["cat"]}, ANY))
    await asyncio.sleep(0.1)
    await sets.put("pets", {"labels": ["dog"]}, ANY)
    await first
    assert (await sets.get("pets")).label_set.names == ("dog",)


async def test_a_stored_set_is_taken_apart_once_for_all_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await LabelSets(FileStore(tmp_path), {}, LabelLimits()).put("pets", {"labels": ["cat"]}, ANY)
    parse, times = label_sets._parse_stored, 0

    def counted(name: str, document: bytes, limits: LabelLimits) -> label_sets.Registered:
        nonlocal times
        times += 1
        time.sleep(0.1)
        return parse(name, document, limits)

    monkeypatch.setattr(label_sets, "_parse_stored", counted)
    sets = LabelSets(FileStore(tmp_path), {}, LabelLimits())
    found = await asyncio.gather(*(sets.get("pets") for _ in range(8)))
    assert (times, {id(one) for one in found}) == (1, {id(found[0])})
