"""BlockAllocator against a model: what each sequence reads back, and that no block is lost."""

import jax
import jax.export
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jax_kvcache import BlockAllocator, OutOfBlocksError

BLOCKS, BLOCK = 9, 3


class Sequences(RuleBasedStateMachine):
    """Tokens are numbers, written to a store of blocks where the allocator says."""

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(BLOCKS, BLOCK)
        self.store = np.full((BLOCKS, BLOCK), -1)
        self.texts: dict[int, list[int]] = {}
        self.next_token = 0

    def write(self, sequence, start):
        """Writes new tokens to all rows of a sequence from `start` on."""
        blocks = self.allocator.blocks(sequence)
        del self.texts[sequence][start:]
        for row in range(start, self.allocator.length(sequence)):
            self.store[blocks[row // BLOCK], row % BLOCK] = self.next_token
            self.texts[sequence].append(self.next_token)
            self.next_token += 1

    def state(self):
        of_each = {s: self.allocator.blocks(s) for s in self.allocator.sequences}
        return of_each, self.allocator.num_free, [*map(self.allocator.length, of_each)]

    def any_sequence(self, data):
        return data.draw(st.sampled_from(sorted(self.texts)), label="sequence")

    @rule(length=st.integers(0, 3 * BLOCK))
    def allocate(self, length):
        before = self.state()
        try:
            sequence = self.allocator.allocate(length)
        except OutOfBlocksError:
            assert -(-length // BLOCK) > self.allocator.num_free
            assert self.state() == before
            return
        assert sequence not in self.texts
        self.texts[sequence] = []
        self.write(sequence, 0)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.integers(0, 2 * BLOCK))
    def step(self, data, tokens):
        """Several sequences grow; then the copies, in order; then the new tokens are written."""
        batch = data.draw(st.permutations(sorted(self.texts)), label="batch")
        copies, starts = [], {}
        for sequence in batch[: data.draw(st.integers(1, len(batch)))]:
            before, start = self.state(), self.allocator.length(sequence)
            try:
                copies.append(self.allocator.append(sequence, tokens))
            except OutOfBlocksError:
                assert self.state() == before
                assert self.allocator.num_free < -(-tokens // BLOCK) + 1
                break
            starts[sequence] = start
        for source, destination in copies:
            assert (source < 0) == (destination < 0)
            if source >= 0:
                self.store[destination] = self.store[source]
        for sequence, start in starts.items():
            self.write(sequence, start)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def step_that_does_not_run(self, data):
        """Nothing is copied or written; the next step must ask for the same copies again."""
        batch = data.draw(st.permutations(sorted(self.texts)), label="batch")
        tokens = {sequence: data.draw(st.integers(0, 2 * BLOCK)) for sequence in batch}
        before, free = self.state(), self.allocator.num_free
        needed = self.allocator.blocks_needed(tokens)
        try:
            self.allocator.append_batch(tokens, batch=len(batch), columns=2 * BLOCKS)
        except OutOfBlocksError:
            assert needed > free
        else:
            assert needed == free - self.allocator.num_free
            self.allocator.undo()
        assert (self.state(), self.allocator.num_free) == (before, free)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        sequence, free = self.any_sequence(data), self.allocator.num_free
        length = data.draw(st.none() | st.integers(0, len(self.texts[sequence])), label="length")
        new = self.allocator.fork(sequence, length)
        self.texts[new] = self.texts[sequence][:length]
        assert self.allocator.num_free == free

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.any_sequence(data)
        length = data.draw(st.integers(0, len(self.texts[sequence])), label="length")
        self.allocator.truncate(sequence, length)
        del self.texts[sequence][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        sequence = self.any_sequence(data)
        self.allocator.free(sequence)
        del self.texts[sequence]

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        assert set(self.allocator.sequences) == set(self.texts)
        for sequence, text in self.texts.items():
            assert self.allocator.length(sequence) == len(text)
            rows = self.store[list(self.allocator.blocks(sequence))].reshape(-1)
            assert rows[: len(text)].tolist() == text

    @invariant()
    def no_block_is_lost_or_had_twice(self):
        tables = [self.allocator.blocks(sequence) for sequence in self.texts]
        for sequence, table in zip(self.texts, tables, strict=True):
            assert len(set(table)) == len(table) == -(-len(self.texts[sequence]) // BLOCK)
        assert len(set().union(*tables)) + self.allocator.num_free == BLOCKS

    def teardown(self):
        for sequence in self.texts:
            self.allocator.free(sequence)
        assert sorted(self.allocator.blocks(self.allocator.allocate(BLOCKS * BLOCK))) == [
            *range(BLOCKS)
        ]


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_the_last_block_of_a_shared_prefix_is_copied_once():
    allocator = BlockAllocator(8, 4)
    parent = allocator.allocate(6)
    child = allocator.fork(parent)
    shared = allocator.blocks(parent)
    copy = allocator.append(parent)
    assert copy.source == shared[1]
    assert allocator.blocks(parent) == (shared[0], copy.destination)
    assert allocator.append(child) == (-1, -1)  # by now the only one that has the block
    assert allocator.blocks(child) == shared


def test_whole_blocks_are_shared_without_a_copy():
    allocator = BlockAllocator(8, 4)
    parent = allocator.allocate(11)
    child = allocator.fork(parent, 8)
    assert allocator.append(child, 5) == (-1, -1)
    assert allocator.blocks(child)[:2] == allocator.blocks(parent)[:2]
    assert allocator.num_free == 8 - 3 - 2


def test_block_table():
    allocator = BlockAllocator(8, 4)
    one, two = allocator.allocate(5), allocator.allocate(0)
    table = allocator.block_table([two, None, one], columns=3)
    assert table.dtype == np.int32
    assert table.tolist() == [[-1] * 3, [-1] * 3, [*allocator.blocks(one), -1]]


def test_append_batch():
    allocator = BlockAllocator(8, 4)
    one, two = allocator.allocate(5), allocator.allocate(0)
    fork = allocator.fork(one)
    shared = allocator.blocks(one)
    batch = allocator.append_batch({two: 3, fork: 2}, batch=3, steps=4, columns=2)
    assert all(array.dtype == np.int32 for array in batch)
    assert batch.positions.tolist() == [[0, 1, 2, -1], [5, 6, -1, -1], [-1] * 4]
    own = allocator.blocks(fork)
    assert own[0] == shared[0]
    assert batch.block_table.tolist() == [[*allocator.blocks(two), -1], [*own], [-1, -1]]
    assert batch.sources.tolist() == [-1, shared[1], -1]
    assert batch.destinations.tolist() == [-1, own[1], -1]
    assert [allocator.length(sequence) for sequence in (one, two, fork)] == [5, 3, 7]


def test_append_batch_copies_in_the_order_of_the_batch():
    """The last of those that share a block needs no copy."""
    allocator = BlockAllocator(8, 4)
    one = allocator.allocate(2)
    sequences = [one, allocator.fork(one), allocator.fork(one)]
    (shared,) = allocator.blocks(one)
    batch = allocator.append_batch(dict.fromkeys(sequences, 1), batch=3, steps=1, columns=1)
    assert batch.sources.tolist() == [shared, shared, -1]
    assert batch.block_table[2].tolist() == [shared]


@pytest.mark.parametrize(("most", "steps"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
@pytest.mark.parametrize("kind", [int, np.int8])
def test_steps_are_a_power_of_two(most, steps, kind):
    allocator = BlockAllocator(8, 4)
    tokens = {allocator.allocate(): kind(most), allocator.allocate(): 0}
    batch = allocator.append_batch(tokens, batch=2, columns=2)
    assert batch.positions.shape == (2, steps)


def test_a_batch_is_an_argument_of_an_exported_function():
    allocator = BlockAllocator(8, 4)
    batch = allocator.append_batch({allocator.allocate(): 3}, batch=2, columns=2)
    exported = jax.export.export(jax.jit(lambda batch: batch.positions + 1))(batch)
    got = jax.export.deserialize(exported.serialize()).call(batch)
    assert got.tolist() == (batch.positions + 1).tolist()


def test_an_empty_batch_is_padding():
    batch = BlockAllocator(8, 4).append_batch({}, batch=2, columns=3)
    assert [array.shape for array in batch] == [(2, 1), (2, 3), (2,), (2,)]
    assert all((array == -1).all() for array in batch)


@pytest.mark.parametrize(
    ("tokens", "sizes", "error", "message"),
    [
        ({0: 2, 1: 3}, {}, OutOfBlocksError, "3 blocks are needed and 2 of 4 are free"),
        ({0: 1, 7: 1}, {}, ValueError, "`sequence` must be one that is allocated, got 7"),
        ({0: 1, 1: -1}, {}, ValueError, "`tokens` must be at least 0, got -1"),
        ({0: 1, 1: 1.0}, {}, TypeError, "`tokens` must be an int, got 1.0"),
        ({0: 1, 1: 1}, {"batch": 1}, ValueError, "`batch` must be at least 2, got 1"),
        ({0: 2}, {"steps": 1}, ValueError, "`steps` must be at least 2, got 1"),
        ({0: 1}, {"columns": 1}, ValueError, "`columns` must be at least 2, the blocks of seq"),
        ({0: 1}, {"steps": 2**70}, ValueError, "exceeded"),
        ({}, {"batch": 0}, ValueError, "`batch` must be at least 1, got 0"),
        ([0, 1], {}, TypeError, r"`tokens` must be a mapping .* got \[0, 1\]"),
    ],
)
def test_a_batch_that_is_refused_changes_nothing(tokens, sizes, error, message):
    allocator = BlockAllocator(4, 2)
    first = allocator.allocate(3)
    allocator.fork(first)

    def state():
        return {s: (allocator.length(s), allocator.blocks(s)) for s in allocator.sequences}

    before = state()
    with pytest.raises(error, match=message):
        allocator.append_batch(tokens, **{"batch": 2, "steps": 4, "columns": 3} | sizes)
    assert state() == before
    assert allocator.num_free == 2
    # The references are as they were: one copy, and each row is given once.
    assert allocator.append(0).source == before[0][1][1]
    assert allocator.append(1) == (-1, -1)


@pytest.mark.parametrize("change", ["undo", "append", "allocate", "fork", "truncate", "free"])
def test_undo_follows_the_batch(change):
    allocator = BlockAllocator(8, 4)
    one = allocator.allocate(3)
    with pytest.raises(ValueError, match="`undo` must follow an `append_batch`"):
        allocator.undo()
    allocator.append_batch({one: 3}, batch=1, columns=2)
    getattr(allocator, change)(*{
        "undo": (), "allocate": (1,), "truncate": (one, 4),
    }.get(change, (one,)))  # fmt: skip
    with pytest.raises(ValueError, match="with no other change between"):
        allocator.undo()


def test_a_batch_that_is_refused_leaves_the_one_before_to_undo():
    allocator = BlockAllocator(8, 4)
    one = allocator.allocate(3)
    allocator.append_batch({one: 3}, batch=1, columns=2)
    with pytest.raises(ValueError, match="`columns` must be at least 3"):
        allocator.append_batch({one: 4}, batch=1, columns=2)
    allocator.undo()
    assert (allocator.length(one), allocator.num_free) == (3, 7)


def test_an_interrupted_batch_changes_nothing(monkeypatch):
    allocator = BlockAllocator(8, 4)
    one, two = allocator.allocate(3), allocator.allocate(3)
    append, blocks = allocator.append, allocator.blocks(one)

    def interrupted(sequence, tokens):
        if sequence == two:
            raise KeyboardInterrupt
        return append(sequence, tokens)

    monkeypatch.setattr(allocator, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        allocator.append_batch({one: 3, two: 3}, batch=2, columns=2)
    assert (allocator.length(one), allocator.blocks(one)) == (3, blocks)
    assert allocator.num_free == 6


def refusals():
    allocator = BlockAllocator(4, 2)
    one = allocator.allocate(5)
    gone = allocator.allocate(1)
    allocator.free(gone)
    known = "`sequence` must be one that is allocated, got"
    return {
        "num_blocks": (lambda: BlockAllocator(0, 2), ValueError, "`num_blocks` must be at least 1"),
        "block_size": (lambda: BlockAllocator(2, 2.0), TypeError, "`block_size` .* got 2.0"),
        "rows": (lambda: BlockAllocator(2, 2**30), ValueError, "rows, got 2147483648"),
        "negative": (lambda: allocator.allocate(-1), ValueError, "`length` .* at least 0, got -1"),
        "bool": (lambda: allocator.append(one, True), TypeError, "`tokens` must be an int, got Tr"),
        "full": (lambda: allocator.append(one, 4), OutOfBlocksError, "2 blocks .* 1 of 4 are free"),
        "longer": (lambda: allocator.truncate(one, 6), ValueError, "at most 5, .* length, got 6"),
        "fork": (lambda: allocator.fork(one, 6), ValueError, "`length` must be at most 5"),
        "freed": (lambda: allocator.free(gone), ValueError, f"{known} 1"),
        "unknown": (lambda: allocator.append(7), ValueError, f"{known} 7"),
        "length": (lambda: allocator.length(-1), ValueError, f"{known} -1"),
        "columns": (
            lambda: allocator.block_table([one], 2), ValueError,
            "`columns` must be at least 3, the blocks of sequence 0, got 2",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_refuses(name):
    call, error, message = refusals()[name]
    with pytest.raises(error, match=message):
        call()
