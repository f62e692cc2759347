"""Blocks are owned or free, never both, and a prefix is reused only when every token of it is the same."""

import random

import pytest

from attention.blocks import NOTHING, ROOT, BlockPool, OutOfBlocks, Prefix

SIZE = 4


def match(pool: BlockPool, tokens: list[int], limit: int) -> Prefix:
    prefix = pool.find(tokens, limit)
    pool.take(prefix)
    return prefix


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """What a sequence does: reuse a prefix, allocate the rest, publish its full blocks."""
    prefix = match(pool, tokens, len(tokens))
    blocks, contents = list(prefix.blocks), list(prefix.contents)
    while len(blocks) * SIZE < len(tokens):
        blocks.append(pool.allocate())
    for index in range(len(contents), len(tokens) // SIZE):
        parent = contents[-1] if contents else ROOT
        contents.append(pool.publish(blocks[index], parent, tokens[index * SIZE : (index + 1) * SIZE]))
    return blocks


def test_an_equal_prefix_shares_its_full_blocks() -> None:
    pool = BlockPool(16, SIZE)
    first = fill(pool, list(range(10)))
    second = fill(pool, [*range(8), 99, 98])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert pool.owned == 4


def test_the_same_tokens_after_another_beginning_are_another_content() -> None:
    pool = BlockPool(16, SIZE)
    fill(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert match(pool, [9, 9, 9, 9, 5, 6, 7, 8], 8).blocks == ()
    assert match(pool, [5, 6, 7, 8], 4).blocks == ()


def test_the_limit_keeps_tokens_to_be_computed() -> None:
    pool = BlockPool(16, SIZE)
    blocks = fill(pool, list(range(8)))
    assert match(pool, list(range(8)), 7).blocks == (blocks[0],)


def test_released_content_stays_until_its_place_is_needed() -> None:
    pool = BlockPool(3, SIZE)
    old = fill(pool, list(range(12)))
    pool.release(old)
    assert (pool.owned, pool.available) == (0, 3)
    assert match(pool, list(range(12)), 12).blocks == tuple(old)
    pool.release(old)
    taken = pool.allocate()
    assert taken == old[-1]  # the tail goes before the head
    assert match(pool, list(range(12)), 12).blocks == tuple(old[:2])


def test_a_full_pool_says_so() -> None:
    pool = BlockPool(2, SIZE)
    pool.allocate(), pool.allocate()
    with pytest.raises(OutOfBlocks, match="all 2 blocks of 4 tokens"):
        pool.allocate()


def test_what_was_just_found_is_reused_last() -> None:
    pool = BlockPool(4, SIZE)
    first, second = fill(pool, list(range(8))), fill(pool, list(range(50, 58)))
    pool.release(first)
    pool.release(second)
    found = pool.find(list(range(8)), 8)
    assert pool.refresh(found) == 2
    assert [pool.allocate() for _ in range(4)] == [second[1], second[0], first[1], first[0]]
    assert pool.refresh(Prefix((first[0],), found.contents[:1])) == 0  # somebody owns it


@pytest.mark.parametrize("seed", range(20))
def test_what_was_found_before_changes_no_finding(seed: int) -> None:
    """However blocks were given to others meanwhile, and the same tokens computed anew in other places."""
    rng = random.Random(seed)
    pool = BlockPool(12, SIZE)
    waiting = [[rng.randrange(2) for _ in range(rng.randint(1, 24))] for _ in range(6)]
    before = [NOTHING] * len(waiting)
    shorter = 0
    for _ in range(300):
        tokens = rng.choice(waiting)[: rng.randint(1, 24)] + [rng.randrange(2) for _ in range(rng.randint(0, 8))]
        if -(-len(tokens) // SIZE) <= pool.available:
            pool.release(fill(pool, tokens))
        for index, wanted in enumerate(waiting):
            found = pool.find(wanted, len(wanted) - 1, before[index])
            assert found == pool.find(wanted, len(wanted) - 1)
            shorter += len(found.blocks) < len(before[index].blocks)
            before[index] = found
    assert shorter > 10


@pytest.mark.parametrize("seed", range(20))
def test_any_history_ends_with_every_block_free(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(24, SIZE)
    held: list[tuple[list[int], list[int]]] = []
    content_of: dict[int, tuple[int, ...]] = {}
    for _ in range(400):
        if held and rng.random() < 0.5:
            blocks, _ = held.pop(rng.randrange(len(held)))
            pool.release(blocks)
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            if -(-len(tokens) // SIZE) > pool.available:
                continue
            before = set().union(*(blocks for blocks, _ in held)) if held else set()
            blocks = fill(pool, tokens)
            for index, block in enumerate(blocks):
                whole = tuple(tokens[: (index + 1) * SIZE])
                if block in before:  # shared with a running sequence: then with the very same tokens
                    assert len(whole) == (index + 1) * SIZE
                    assert content_of[block] == whole
                content_of[block] = whole
            held.append((blocks, tokens))
        assert pool.owned == len(set().union(*(blocks for blocks, _ in held)) if held else ())
        assert pool.owned + pool.available == pool.total
    for blocks, _ in held:
        pool.release(blocks)
    assert pool.owned == 0
