"""Which full blocks hold which texts: a tree of blocks, whose paths are the texts that are known."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 32
"""Tokens of a block."""


class Node:
    """A full block, whose text is its ancestors' and its own tokens; or the root of an owner's texts."""

    __slots__ = ("block", "children", "idle_since", "key", "parent", "users")

    def __init__(self, parent: "Node | None" = None, key: bytes = b"", block: int = -1) -> None:
        self.parent, self.key, self.block = parent, key, block
        self.children: dict[bytes, Node] = {}
        self.users = 0
        """Slots that hold the block. They hold its ancestors as well."""
        self.idle_since = 0


class PrefixIndex:
    """The full blocks of one pool, by text and owner, and those that no slot uses by the time of their use.

    A block is found by its own ids and its ancestors', each compared in full: a hash alone could give a text
    another's keys and values. Owners have separate trees, since the time to a first token tells whether a
    prefix is cached (CVE-2025-46570).
    """

    def __init__(self) -> None:
        self._roots: dict[str | None, Node] = {}
        # the least recently used first. A slot gives its blocks back from the last to the first, so a block
        # comes after its descendants, and the first has none
        self._idle: OrderedDict[Node, None] = OrderedDict()

    def root(self, owner: str | None) -> Node:
        return self._roots.setdefault(owner, Node())

    def longest_prefix(self, ids: Sequence[int], owner: str | None) -> list[Node]:
        """The path of known blocks that ``ids`` begins with, without its last token."""
        node, path = self.root(owner), []
        for start in range(0, len(ids) - BLOCK_TOKENS, BLOCK_TOKENS):
            found = node.children.get(key_of(ids[start : start + BLOCK_TOKENS]))
            if found is None:
                break
            path.append(node := found)
        return path

    def insert(self, parent: Node, ids: Sequence[int], block: int) -> Node:
        """The node of a full block after ``parent``: the one that holds this text already, or a new one."""
        key = key_of(ids)
        found = parent.children.get(key)
        if found is None:
            found = parent.children[key] = Node(parent, key, block)
        return found

    def use(self, node: Node) -> None:
        """Counts one more slot."""
        if not node.users and node in self._idle:
            del self._idle[node]
        node.users += 1

    def disuse(self, node: Node, tick: int) -> None:
        """Counts one slot less; a node without any becomes idle, as the most recently used one."""
        node.users -= 1
        if not node.users:
            node.idle_since = tick
            self._idle[node] = None

    @property
    def idle(self) -> int:
        """Blocks that no slot uses."""
        return len(self._idle)

    @property
    def oldest(self) -> Node:
        """The least recently used idle node."""
        return next(iter(self._idle))

    def evict(self) -> int:
        """Forgets the least recently used idle block and returns it."""
        node, _ = self._idle.popitem(last=False)
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.key]
        return node.block


def key_of(ids: Sequence[int]) -> bytes:
    """Ids as bytes, which are compared exactly, and hashed with a secret of the process."""
    return array("I", ids).tobytes()
