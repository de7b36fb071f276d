"""Decode steps whose state lives on the device: the host fills it, lets some steps run, and looks at the record.

A step embeds the last token of every row, runs the model, samples, and moves the row on; rows that have ended stay
as they are until the host looks. Its shapes never change, so that on a GPU it is captured once in a CUDA graph;
elsewhere, and where graphs are off, the very same function runs as it is.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels import advance_rows
from .attention import PagedAttention
from .graphs import StepGraphs
from .kv_cache import KVCache
from .model import MIN_ROWS
from .prefill import PrefillState, prefill_step
from .sampling import TokenSampler

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # rows of a captured step; then by 64
PREFILL_BUCKETS = (32, 64, 128, 192, 256, 384, 512)  # tokens of a captured prefill
PREFILL_SEQUENCES = (8, 64, 512)  # of a captured prefill; those without tokens cost next to nothing
MIN_WIDTH = 16  # blocks of the narrowest block table
LONG_WIDTH = 1024  # from so many blocks on, widths grow by half as many


class DecodeState:
    """The rows of a decode step, on the device, and the host's memory that fills and reads them.

    words (4, B) int64: the last token of each row, where it stands, the tokens generated and how many are to be (a
    row with as many has ended); members (2, B) int64: prompt and group index; context_lens (B,) int32: the length
    with the last token, 0 for rows that have ended; step (1,) int64: the place of the next step in the record; table
    (B, width) int32: all of them parts of one tensor, which one copy fills. record (steps, 3, B) float64: token,
    log-prob and kept mass of each step; seen (B, V) bool where the repetition penalty asks for it. leaders (R,) int64
    are the rows that are computed, None: all; rows (B,) int64 names the computed row that each row equals.

    staged and recorded are the host's copies of inputs and record, in pinned memory where the device is a GPU.
    """

    def __init__(self, batch, width, steps, device, *, vocab_size=None):
        self.batch, self.width = batch, width
        # Parts begin at multiples of 16 bytes, which kernels make use of.
        sizes = (8 * batch, 4 * batch, -(-batch // 4) * 4, 4, batch * width)
        self.inputs = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        words, members, lens, step, table = self.inputs.split(sizes)
        self.words = words.view(torch.int64).view(4, batch)
        self.members = members.view(torch.int64).view(2, batch)
        self.context_lens, self.step = lens[:batch], step[:2].view(torch.int64)
        self.table = table.view(batch, width)
        self.growing = sum(sizes[:3])  # from here on what a window begins with: step and table
        self.record = torch.zeros(steps, 3, batch, dtype=torch.float64, device=device)
        self.staged, self.recorded = (
            torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            for like in (self.inputs, self.record)
        )
        self.seen = None
        if vocab_size is not None:
            self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)
        self.leaders, self.rows = None, torch.arange(batch, device=device)

    def share(self, sequences):
        """Compute equal ones of ``sequences`` once; for one step, after which they may differ."""
        distinct, rows = {}, []
        for sequence in sequences:
            rows.append(distinct.setdefault(tuple(sequence.token_ids), len(distinct)))
        if len(distinct) < len(sequences):
            self.rows = torch.tensor(rows, device=self.words.device)
            leaders = [rows.index(i) for i in range(len(distinct))]
            self.leaders = torch.tensor(leaders, device=self.words.device)


class DecodeRun:
    """Windows of steps on rows that stay where they are: the device goes on while the host looks at the last window.

    A window is opened, takes its steps in one or more calls, is closed, and is read when the next has been opened or
    not, but before that is closed. Between windows the device keeps its state: only block tables grow. What is staged
    may be on its way to the device when blocks are added to it: that they come early does no harm.
    """

    def __init__(self, state, step, sequences, limit):
        """Write ``sequences`` into the first rows of ``state``, on which no step is under way; the others have ended.

        step: runs one step; limit: the tokens of a completion.
        """
        self.state, self.step, self.sequences = state, step, sequences
        self.steps = 0  # of the open window
        self.unread = 0  # of all windows, the open one included
        self.closed = None  # (record on the host, what waits for it)
        self.blocks = [0] * len(sequences)  # of each row, already in the table
        self.changed = slice(None)  # part of the inputs that the next window brings
        self._fill(limit)

    def _fill(self, limit):
        state, sequences, n = self.state, self.sequences, len(self.sequences)
        staged = state.staged.numpy()
        staged[:] = 0
        words = staged[: 12 * state.batch].view(np.int64).reshape(6, state.batch)
        lens = np.fromiter(map(len, sequences), dtype=np.int64, count=n)
        words[0, :n] = [s.token_ids[-1] for s in sequences]
        words[1, :n] = lens - 1
        words[2, :n] = lens - np.fromiter((s.prompt_length for s in sequences), dtype=np.int64, count=n)
        words[3, :n] = limit
        words[4, :n] = [s.prompt_index for s in sequences]
        words[5, :n] = [s.group_index for s in sequences]
        staged[12 * state.batch :][:n] = lens
        if state.seen is not None:
            mark_seen(state.seen, sequences)

    def open(self):
        """Begin a window: the record at its first step, and the blocks that ``sequences`` have got since the last."""
        state, places, blocks = self.state, [], []
        for row, (sequence, had) in enumerate(zip(self.sequences, self.blocks, strict=True)):
            table = sequence.block_table
            if len(table) > had:
                start = row * state.width
                places += range(start + had, start + len(table))
                blocks += table[had:]
                self.blocks[row] = len(table)
        state.staged[-state.table.numel() :].numpy()[places] = blocks
        _copy(state.staged[self.changed], state.inputs[self.changed])
        self.changed = slice(state.growing, None)

    def move(self, state, step):
        """Go on in a ``state`` of as many rows and another width, which the device fills with what it has."""
        _copy(self.state.inputs[: state.growing], state.inputs[: state.growing])
        if state.seen is not None:
            _copy(self.state.seen, state.seen)
        state.staged[state.growing :] = 0
        self.state, self.step, self.blocks = state, step, [0] * len(self.sequences)

    def advance(self, steps):
        """Let the open window take ``steps`` more, for which the block tables must have room."""
        for _ in range(steps):
            self.step()
        self.steps += steps
        self.unread += steps

    def close(self):
        """End the open window: its record is on its way to the host."""
        recorded = self.state.recorded[: self.steps]
        self.closed = recorded, _copy(self.state.record[: self.steps], recorded)
        self.steps = 0

    def read(self):
        """(tokens, logprobs, kept), each (steps, rows) numpy, of the closed window; waits for its steps.

        They are overwritten when the next window is closed. What stands behind the end of a completion means nothing.
        """
        recorded, wait = self.closed
        wait()
        self.unread -= len(recorded)
        tokens, logprobs, kept = recorded[:, :, : len(self.sequences)].numpy().swapaxes(0, 1)
        return tokens.astype(np.int64), logprobs, kept


def _copy(source, destination):
    """Start a copy, to or from pinned memory or on a GPU; returns what waits for its end. On the CPU it is done."""
    destination.copy_(source, non_blocking=True)
    if not (source.is_cuda or destination.is_cuda):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def mark_seen(seen, sequences):
    """Set ``seen`` (R, V) to the tokens of each sequence."""
    rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    tokens = [token for s in sequences for token in s.token_ids]
    seen.zero_()
    seen[torch.from_numpy(rows).to(seen.device), torch.tensor(tokens, device=seen.device)] = True


def _draw_by_rows(model, hidden_states, draw, state):
    """(tokens, logprobs, kept or None) of all rows, from the logits of so many computed rows at a time."""
    counts, drawn = state.words[2], []
    for start in range(0, len(hidden_states), draw.most_rows):
        some = hidden_states[start : start + draw.most_rows]
        draws = slice(start, start + len(some)) if state.leaders is None else slice(None)
        rows = state.rows[: len(some)] if state.leaders is None else state.rows
        seen = None if state.seen is None else state.seen[draws if state.leaders is None else state.leaders]
        drawn.append(draw(model.logits(some), rows, state.members[:, draws], counts[draws], seen))
    if len(drawn) == 1:
        return drawn[0]
    return [None if x[0] is None else torch.cat(x) for x in zip(*drawn, strict=True)]


def decode_step(model, cache, draw, state):
    """One token for every row of ``state`` that has not ended."""
    tokens, positions, counts, _ = state.words
    inputs, slots, source = (tokens, positions, state.table, state.context_lens), None, None
    if state.leaders is not None:
        page, source = cache.block_size, state.rows
        block = state.table.gather(1, (positions // page)[:, None])[:, 0]
        slots = torch.where(state.context_lens > 0, block * page + positions % page, -1)
        inputs = [x[state.leaders] for x in inputs]
    computed = len(inputs[0])
    if not tokens.is_cuda and computed < MIN_ROWS:
        # Padding: tokens that store nothing, of rows that see nothing.
        inputs = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, MIN_ROWS - computed)) for x in inputs]
    tokens, positions, table, context_lens = inputs
    hidden_states = model(tokens, positions, PagedAttention(cache, slots, source, table, context_lens))
    if draw.plain and state.leaders is None and computed > draw.most_whole:
        tokens, logprobs = draw.from_head(hidden_states[:computed], model.head, state.members, counts)
        kept = None
    else:
        tokens, logprobs, kept = _draw_by_rows(model, hidden_states[:computed], draw, state)
    if state.seen is not None:
        state.seen.scatter_(1, tokens[:, None], True)
    advance_rows(
        tokens, logprobs, kept, draw.stops, state.words, state.context_lens, state.record, state.step
    )


class Decoder:
    """Runs a policy's prefills and decode steps: on a GPU by CUDA graphs, which are kept from call to call."""

    def __init__(self, policy, *, graphs, kv_dtype=None):
        """kv_dtype: of the cache, torch.int8 for codes with scales; None: the policy's."""
        self.policy = policy
        self.kv_dtype = kv_dtype or policy.dtype
        self.on_gpu = policy.device.type == "cuda"
        self.graphs = StepGraphs(policy) if graphs and self.on_gpu else None
        self.looks_ahead = self.on_gpu  # elsewhere steps are done when their launch returns
        self.draw = TokenSampler(policy.config.vocab_size, policy.device)
        self.addresses = None
        if self.on_gpu:
            layers = policy.config.num_hidden_layers
            each = 4 if self.kv_dtype == torch.int8 else 2
            self.addresses = torch.zeros(layers, each, dtype=torch.int64, device=policy.device)

    def cache(self, num_blocks, block_size):
        """A ``KVCache`` that the captured steps can read; where there is no room, what they work in makes some."""
        policy = self.policy
        make = lambda: KVCache(
            policy.config, num_blocks, block_size,
            device=policy.device, dtype=self.kv_dtype, addresses=self.addresses,
        )  # fmt: skip
        # Memory apart is not made of what the allocator keeps for reuse: that goes first, then what can be remade.
        for give_back in (torch.cuda.empty_cache, self._drop_steps):
            try:
                return make()
            except torch.OutOfMemoryError:
                give_back()
        return make()

    def _drop_steps(self):
        for steps in (self.graphs, self.policy.steps):
            if steps is not None:
                steps.clear()
        self.policy.graph_pool.give_back()  # also what no graph has used yet
        torch.cuda.empty_cache()

    def prefill(self, cache, parts):
        """Compute ``parts``: (sequence, stop), each from its ``num_cached``; hidden states (S, D) of their ends."""
        tokens, sequences = sum(stop - s.num_cached for s, stop in parts), len(parts)
        width = max(len(s.block_table) for s, _ in parts)
        small = self.on_gpu and tokens <= PREFILL_BUCKETS[-1]
        if small:  # the launches take longer than the work; without graphs too a GPU computes these shapes
            tokens, sequences = _bucket(tokens, PREFILL_BUCKETS), _bucket(sequences, PREFILL_SEQUENCES)
            width = _table_width(width)
        elif not self.on_gpu:
            tokens = max(tokens, MIN_ROWS)

        def make():
            state = PrefillState(tokens, sequences, width, self.policy.device)
            return state, lambda: prefill_step(self.policy.model, cache, state)

        key = "prefill", tokens, sequences, width, cache.block_size
        state, run = self._step(cache, key, make) if small else make()
        state.fill(parts, cache.block_size)
        run()
        return state.hidden_states

    def prepare(self, cache, sequences, window):
        """Have a step for ``sequences`` captured and checked while the device has other work to do."""
        if self.graphs is not None:
            self._decode_step(cache, *self._shape(sequences), window)

    def start(self, cache, sequences, steps, window):
        """A ``DecodeRun`` of ``sequences``. steps: of its first window; window: the most of any window."""
        state, step = self._decode_step(cache, *self._shape(sequences), window)
        if steps == 1 and not (self.on_gpu or self.looks_ahead):
            state.share(sequences)
        return DecodeRun(state, step, sequences, self.draw.params.max_tokens)

    def open(self, cache, run):
        """Begin a window of ``run``, on a wider block table if its sequences have outgrown it."""
        _, width = self._shape(run.sequences)
        if width > run.state.width:
            run.move(*self._decode_step(cache, run.state.batch, width, len(run.state.record)))
        run.open()

    def fits(self, run, sequences):
        """Whether ``sequences``, those of ``run`` that have not ended, would now be given as many rows."""
        return bool(sequences) and self._shape(sequences)[0] == run.state.batch

    def _shape(self, sequences):
        width = _table_width(max(len(s.block_table) for s in sequences))
        return _bucket(len(sequences), BUCKETS) if self.on_gpu else len(sequences), width

    def _decode_step(self, cache, batch, width, window):
        def make():
            penalty = self.draw.params.repetition_penalty != 1
            vocab_size = self.policy.config.vocab_size if penalty else None
            state = DecodeState(batch, width, window, self.policy.device, vocab_size=vocab_size)
            return state, lambda: decode_step(self.policy.model, cache, self.draw, state)

        return self._step(cache, ("decode", batch, width, window, cache.block_size, self.draw.key), make)

    def _step(self, cache, key, make):
        """(state, run) of a step; a captured one is checked against the policy once a cache."""
        if self.graphs is None:
            return make()
        if key not in cache.steps:
            cache.steps[key] = self.graphs.get(key, make)
        return cache.steps[key]


def _bucket(count, buckets):
    return next((size for size in buckets if size >= count), -(-count // 64) * 64)


def _table_width(blocks):
    """Blocks of a table that holds ``blocks``: few widths, few graphs."""
    width = MIN_WIDTH
    while width < blocks and width < LONG_WIDTH:
        width *= 4
    # What attention works in grows with the width, and what has no room in it at once reads a shared prompt again.
    return width if blocks <= width else -(-blocks // (LONG_WIDTH // 2)) * (LONG_WIDTH // 2)
