"""Trees of drafted tokens: which nodes there are, what each attends to, and the paths through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """A static tree of drafts: each path names a node by its rank among its parent's drafts, level by level.

    `paths` holds every node but the root; a chain of n tokens is `DraftTree.chain(n)`. Nodes are numbered
    from the root, 0, by depth and then by path. Each node that has children drafts `drafts_per_node` tokens,
    in the order of nodes ("EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", Li et al.,
    2024, arXiv 2401.15077).

    Raises:
        ValueError: no paths, one without its parent, one named twice, or a rank out of range.
    """

    paths: tuple[Path, ...]
    drafts_per_node: int = 10

    def __post_init__(self) -> None:
        ordered = sorted((tuple(path) for path in self.paths), key=lambda path: (len(path), path))
        known = {(), *ordered}
        orphans = [path for path in ordered if not path or path[:-1] not in known]
        ranks = [rank for path in ordered for rank in path]
        if not ordered or orphans or len(known) != len(ordered) + 1:
            wrong = f"{list(orphans[0])} has no parent" if orphans else "none, or one twice"
            raise ValueError(f"paths of a draft tree are {wrong}; give every node once, parents included")
        if not all(0 <= rank < self.drafts_per_node for rank in ranks):
            raise ValueError(
                f"ranks in paths are {min(ranks)} to {max(ranks)}; a node drafts {self.drafts_per_node} "
                f"tokens, 0 to {self.drafts_per_node - 1}"
            )
        object.__setattr__(self, "paths", tuple(ordered))

    @classmethod
    def chain(cls, length: int) -> "DraftTree":
        """One draft after the other, `length` of them."""
        return cls(tuple((0,) * count for count in range(1, length + 1)))

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]], drafts_per_node: int = 10) -> "DraftTree":
        """A tree from lists of ranks."""
        return cls(tuple(tuple(path) for path in paths), drafts_per_node)

    @cached_property
    def nodes(self) -> dict[Path, int]:
        """The number of every node, the root's () included."""
        return {path: number for number, path in enumerate(((), *self.paths))}

    @cached_property
    def expanded(self) -> list[Path]:
        """Nodes that have children, in the order in which they draft."""
        parents = {path[:-1] for path in self.paths}
        return [path for path in self.nodes if path in parents]

    @property
    def depth(self) -> Tensor:
        """Depth of each node, int64 [n]; the root has 0."""
        return torch.tensor([len(path) for path in self.nodes])

    @property
    def mask(self) -> Tensor:
        """Which nodes each node attends to, bool [n, n]: itself and what lies above it."""
        mask = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.bool)
        for path, number in self.nodes.items():
            mask[number, [self.nodes[path[:length]] for length in range(len(path) + 1)]] = True
        return mask

    @property
    def draft_places(self) -> Tensor:
        """The place of each node's token in [root, drafts of the first expanded node, of the second, …],
        int64 [n]."""
        order = {path: number for number, path in enumerate(self.expanded)}
        places = [1 + self.drafts_per_node * order[path[:-1]] + path[-1] for path in self.paths]
        return torch.tensor([0, *places])

    @cached_property
    def candidates(self) -> Tensor:
        """The nodes of each path from the root to a leaf, int64 [P, depth + 1]; -1 behind shorter ones."""
        parents, longest = set(self.expanded), max(map(len, self.paths)) + 1
        leaves = [path for path in self.paths if path not in parents]
        rows = [[self.nodes[path[:length]] for length in range(len(path) + 1)] for path in leaves]
        padded = [row + [-1] * (longest - len(row)) for row in rows]
        past_all = len(self.nodes) + 1
        return torch.tensor(sorted(padded, key=lambda row: [past_all if n < 0 else n for n in row]))

    @property
    def parent_ranks(self) -> Tensor:
        """The rank of each candidate entry's parent among the expanded nodes of its level, int64 [P, depth +
        1]; -1 at the root. Behind shorter paths stands that of the last node, as in the reference."""
        ranks = [-1]
        for path in self.paths:
            level = [parent for parent in self.expanded if len(parent) == len(path) - 1]
            ranks.append(level.index(path[:-1]))
        return torch.tensor(ranks)[self.candidates]

    @cached_property
    def siblings(self) -> list[list[list[int]]]:
        """For each candidate entry the nodes that its parent drafted before it."""
        before = {0: []}
        for path, number in self.nodes.items():
            if path:
                before[number] = [
                    self.nodes[(*path[:-1], rank)]
                    for rank in range(path[-1])
                    if (*path[:-1], rank) in self.nodes
                ]
        return [[before.get(node, []) for node in row] for row in self.candidates.tolist()]
