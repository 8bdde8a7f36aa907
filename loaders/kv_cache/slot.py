"""What one slot holds."""

from dataclasses import dataclass, field

from loaders.kv_cache.prefix_index import BLOCK_TOKENS, Node


@dataclass
class Slot:
    """A sequence's blocks, and how much of its text is in the prefix index."""

    blocks: list[int] = field(default_factory=list)
    """In the order of the tokens; the last ones may be reserved and empty."""
    length: int = 0
    """Tokens in the blocks."""
    attached: int = 0
    """Of these, tokens that came from the cache."""
    path: list[Node] = field(default_factory=list)
    """Nodes of the first blocks, which are full and indexed."""
    parent: Node | None = None
    """The node that the next full block follows; None: the slot's text is not indexed."""
    tail: list[int] = field(default_factory=list)
    """Ids after the last indexed block."""
    queried: int = 0
    """Tokens that were looked for in the cache and are not in the pool's figures yet."""

    def missing(self, tokens: int) -> int:
        """Blocks that ``tokens`` more need; not positive if there are enough."""
        return -(-(self.length + tokens) // BLOCK_TOKENS) - len(self.blocks)
