"""Who owns which block of the latent cache, and which full blocks can be reused by a later request.

A full block's content is identified by (content of the block before it, its own tokens), compared in full:
a match is never a hash collision. A released block that has such an identity stays until its place is needed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0  # the content identity before a sequence's first block


class OutOfBlocks(Exception):
    """Every block is owned by a running sequence."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks that already hold a prompt's first tokens, and the content identity of the last of them."""

    blocks: tuple[int, ...]
    contents: tuple[int, ...]


NOTHING = Prefix((), ())


class BlockPool:
    """Reference-counted blocks with least-recently-used reuse of released ones."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a cache of {blocks} blocks of {block_size} tokens: both must be at least 1")
        self.block_size = block_size
        self.total = blocks
        self._never_used = list(range(blocks - 1, -1, -1))
        self._released: OrderedDict[int, None] = OrderedDict()  # reusable content, oldest first
        self._references = [0] * blocks
        self._key_of_block: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._block_of_key: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # -> block, content
        self._content_of_block: dict[int, int] = {}
        self._next_content = ROOT + 1

    @property
    def available(self) -> int:
        """Blocks that an allocation can have now."""
        return len(self._never_used) + len(self._released)

    @property
    def owned(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - self.available

    def allocate(self) -> int:
        """A block with no content; raises OutOfBlocks when every block is owned."""
        if self._never_used:
            block = self._never_used.pop()
        elif self._released:
            block, _ = self._released.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.total} blocks of {self.block_size} tokens are in use")
        self._references[block] = 1
        return block

    def find(self, tokens: Sequence[int], limit: int, before: Prefix = NOTHING) -> Prefix:
        """The longest run of known full blocks within tokens[:limit].

        `before` is what was found of the same tokens before: what is still so is not compared again.
        """
        blocks: list[int] = []
        contents: list[int] = []
        size, full = self.block_size, limit // self.block_size
        for block, content in zip(before.blocks[:full], before.contents, strict=False):
            if self._content_of_block.get(block) != content:
                break
            blocks.append(block)
            contents.append(content)
        content = contents[-1] if contents else ROOT
        for start in range(len(blocks) * size, full * size, size):
            found = self._block_of_key.get((content, tuple(tokens[start : start + size])))
            if found is None:
                break
            block, content = found
            blocks.append(block)
            contents.append(content)
        return Prefix(tuple(blocks), tuple(contents))

    def take(self, prefix: Prefix) -> None:
        """Take shared ownership of what was just found."""
        for block in prefix.blocks:
            if self._references[block] == 0:
                del self._released[block]
            self._references[block] += 1

    def refresh(self, prefix: Prefix) -> int:
        """Of what was just found, how many blocks nobody owns; they are reused last, as if they were just released."""
        unowned = 0
        for block in reversed(prefix.blocks):
            if self._references[block] == 0:
                self._released.move_to_end(block)
                unowned += 1
        return unowned

    def publish(self, block: int, parent: int, tokens: Sequence[int]) -> int:
        """Name a full, computed block's content so that later requests find it; the content's identity."""
        key = (parent, tuple(tokens))
        known = self._block_of_key.get(key)
        if known is not None:  # computed twice at once: the first copy serves, this one stays private
            return known[1]
        content = self._next_content
        self._next_content += 1
        self._block_of_key[key] = (block, content)
        self._key_of_block[block] = key
        self._content_of_block[block] = content
        return content

    def release(self, blocks: Sequence[int]) -> None:
        """Give up ownership, last block first, so that the tail of a prefix is reused before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than taken"
            if self._references[block] == 0:
                if block in self._key_of_block:
                    self._released[block] = None
                else:
                    self._never_used.append(block)

    def _forget(self, block: int) -> None:
        key = self._key_of_block.pop(block, None)
        if key is not None:
            del self._block_of_key[key]
            del self._content_of_block[block]
