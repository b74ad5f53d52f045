"""Label trees: levels, ancestors, lowest common ancestors, ragged depths, roll-up."""

from __future__ import annotations

import pytest
import torch

from ironclip.errors import TreeError
from ironclip.hierarchy import LabelTree

#            thing
#        /     |     \
#    animal  plant   rock          rock is a leaf right under the root: ragged
#    /   \      \
#  dog   cat    tree
PARENTS = {"animal": "thing", "plant": "thing", "rock": "thing", "dog": "animal", "cat": "animal", "tree": "plant"}
LEAVES = ["dog", "cat", "tree", "rock"]


def test_levels_of_a_ragged_tree() -> None:
    bound = LabelTree.parse({"levels": ["name", "kind", "all"], "parents": PARENTS}).bind(LEAVES)
    assert [(lv.name, lv.nodes) for lv in bound.levels] == [
        ("name", ("dog", "cat", "tree", "rock")),
        ("kind", ("animal", "plant", "rock")),
        ("all", ("thing",)),
    ]
    assert bound.level("kind").index.tolist() == [0, 0, 1, 2]
    with pytest.raises(TreeError, match="name, kind, all"):
        bound.level("colour")


def test_text_form_equals_json_form() -> None:
    text = "# a comment\n\n" + "\n".join(f"{child} {parent}" for child, parent in PARENTS.items())
    assert LabelTree.parse(text).parents == PARENTS
    spaced = LabelTree.parse("hot dog\tfast food\npizza\tfast food\n")
    assert spaced.bind(["hot dog", "pizza"]).levels[1].nodes == ("fast food",)
    assert [lv.name for lv in LabelTree.parse(text).bind(LEAVES).levels] == ["0", "1", "2"]


def test_ancestors_and_lca() -> None:
    tree = LabelTree.parse({"parents": PARENTS})
    assert tree.ancestors("dog") == ["animal", "thing"]
    assert tree.ancestors("thing") == []
    assert tree.lca("dog", "cat") == "animal"
    assert tree.lca("dog", "rock") == "thing"
    assert tree.lca("dog", "animal") == "animal"
    assert tree.lca("dog", "dog") == "dog"
    assert LabelTree.parse("a b\nc d").lca("a", "c") is None
    for question in (lambda: tree.lca("unicorn", "unicorn"), lambda: tree.ancestors("unicorn")):
        with pytest.raises(TreeError, match="unicorn"):
            question()


def test_lca_heights() -> None:
    bound = LabelTree.parse({"parents": PARENTS}).bind(LEAVES)
    assert bound.lca_heights.tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 2], [2, 2, 2, 0]]
    forest = LabelTree.parse("a b\nc d").bind(["a", "c"])
    assert forest.lca_heights.tolist() == [[0, 2], [2, 0]]


def test_tree_may_hold_more_than_the_labels() -> None:
    bound = LabelTree.parse({"parents": PARENTS}).bind(["cat", "tree"])
    assert bound.levels[1].nodes == ("animal", "plant")


def test_label_that_is_an_inner_node() -> None:
    bound = LabelTree.parse({"parents": PARENTS}).bind(["dog", "animal", "rock"])
    assert bound.levels[0].nodes == ("dog", "animal", "rock")
    assert bound.levels[1].nodes == ("animal", "rock")
    assert bound.levels[1].index.tolist() == [0, 0, 1]


def test_rollup_is_the_sum_of_probabilities() -> None:
    level = LabelTree.parse({"parents": PARENTS}).bind(LEAVES).levels[1]
    logits = torch.randn(5, 4, dtype=torch.float64) * 10
    p = logits.softmax(-1)
    expected = torch.stack([p[:, 0] + p[:, 1], p[:, 2], p[:, 3]], dim=-1)
    torch.testing.assert_close(level.rollup(logits).softmax(-1), expected)


def test_rollup_is_differentiable_and_does_not_underflow() -> None:
    level = LabelTree.parse({"parents": PARENTS}).bind(LEAVES).levels[1]
    logits = torch.tensor([[500.0, 400.0, -500.0, 0.0]], requires_grad=True)
    rolled = level.rollup(logits)
    torch.testing.assert_close(rolled, torch.tensor([[500.0, -500.0, 0.0]]))
    rolled[0, 1].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 1, 0]]
    point = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(level.rollup, (point,))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (7, "A tree is"),
        ({}, "A tree is"),
        ({"parents": {}}, "no edges"),
        ("", "no edges"),
        ("a b c", "Line 1"),
        ("a b\na c", "two parents"),
        ("a a", "its own parent"),
        ("a b\nb c\nc a", "its own ancestor"),
        ({"parents": {"a": 3}}, "A name was expected"),
        ({"parents": {"a": "b"}, "level": ["x"]}, "Unknown key"),
        ({"parents": {"a": "b", "b": "c"}, "levels": ["x", "y"]}, "2 levels are named"),
        ({"parents": {"a": "b"}, "levels": ["x", "x"]}, "same name"),
        ({"parents": {"a": "b"}, "levels": "xy"}, "list of names"),
        ({"parents": {"a": "b"}, "levels": ["x/y", "z"]}, "slash"),
        ({"parents": {"a": "b"}, "levels": [str(i) for i in range(33)]}, "At most 32"),
        ({"parents": {"a": "b"}, "prompts": {"b": []}}, "not a list"),
        ({"parents": {"a": "b"}, "prompts": {"c": ["x"]}}, "not in the tree"),
        ({"parents": {f"n{i}": f"n{i + 1}" for i in range(40)}}, "nodes deep"),
    ],
)
def test_bad_trees_are_refused(source: object, says: str) -> None:
    with pytest.raises(TreeError, match=says):
        LabelTree.parse(source)


def test_labels_outside_the_tree_are_named() -> None:
    with pytest.raises(TreeError, match="'unicorn'"):
        LabelTree.parse({"parents": PARENTS}).bind(["dog", "unicorn"])


def test_digest_is_of_the_content() -> None:
    a = LabelTree.parse("a x\nb y")
    assert a.digest == LabelTree.parse("b y\na x").digest
    assert a.digest != LabelTree.parse("a x\nb x").digest
    assert a.digest != LabelTree.parse({"parents": a.parents, "levels": ["l", "m"]}).digest
