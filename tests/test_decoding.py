"""Windows of steps that are launched before the last is read: on a device that is late, nothing else changes."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout import LoraConfig, Sampler, SamplingParams, decoding, sampling
from nanogrpo.rollout import sampler as sampler_file
from nanogrpo.rollout.decoding import Decoder, DecodeRun, DecodeState
from nanogrpo.rollout.scheduler import Scheduler, Sequence
from tiny import KeptSteps, tiny_policy

EOS = (5, 9)
SHARED = list(range(20, 40))
PROMPTS = [[*SHARED, 1], [2], [*SHARED, 1, 3, 4], list(range(60, 92)), list(range(60, 77))]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(lora=LoraConfig(r=4), eos_token_ids=EOS)


class LateDevice:
    """Copies and steps of decode runs are done when somebody waits for them and no sooner, in their order."""

    def __init__(self, monkeypatch):
        self.queue, self.done, self.behind = deque(), 0, []
        make, move, read = DecodeRun.__init__, DecodeRun.move, DecodeRun.read
        copy, prefill = decoding._copy, Decoder.prefill

        def late_run(run, state, step, *others):
            assert not self.queue, "a run begins on a state that has steps to do"
            make(run, state, lambda: self.queue.append(step), *others)

        def late_move(run, state, step):
            move(run, state, lambda: self.queue.append(step))

        def late_copy(source, destination):
            self.queue.append(lambda: copy(source, destination))
            place = self.done + len(self.queue)
            return lambda: self.run_to(place)

        def watched_read(run):
            drawn = read(run)
            self.behind.append(run.unread)
            return drawn

        def prefill_of_a_quiet_device(*arguments):
            assert not self.queue, "blocks are given away that steps may still write"
            return prefill(*arguments)

        monkeypatch.setattr(DecodeRun, "__init__", late_run)
        monkeypatch.setattr(DecodeRun, "move", late_move)
        monkeypatch.setattr(decoding, "_copy", late_copy)
        monkeypatch.setattr(DecodeRun, "read", watched_read)
        monkeypatch.setattr(Decoder, "prefill", prefill_of_a_quiet_device)

    def run_to(self, place):
        while self.done < place:
            self.queue.popleft()()
            self.done += 1


def sampler_of(policy, *, ahead=True, kept=True, **options):
    """A sampler on the CPU that computes the shapes of a GPU with steps that are kept, and looks ahead or not."""
    sampler = Sampler(policy, **options)
    if kept:
        sampler.decoder.on_gpu, sampler.decoder.graphs = True, KeptSteps()
    sampler.decoder.looks_ahead = ahead
    return sampler


OPTIONS = [
    {},
    {"ignore_eos": True},
    {"stop": ("a", "kl"), "ignore_eos": True},
    {"stop": ("b",), "stop_token_ids": (7, 30), "min_tokens": 9},
    {"top_k": 5, "repetition_penalty": 1.3, "logit_bias": {3: 1.0, 40: -torch.inf}},
    {"temperature": 0, "stop_token_ids": tuple(range(20, 50))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_looking_ahead_changes_no_bit(policy, options, monkeypatch):
    params = SamplingParams(max_tokens=21, seed=5, **options)
    cases = [
        {"window": 4},
        {"window": 16},
        {"window": 5, "max_batch": 6},
        {"window": 7, "kv_tokens": 12 * 16},
    ]
    expected = [
        sampler_of(policy, ahead=False, **case).generate(PROMPTS, params, group_size=3) for case in cases
    ]
    device = LateDevice(monkeypatch)
    for case, one in zip(cases, expected, strict=True):
        assert sampler_of(policy, **case).generate(PROMPTS, params, group_size=3) == one
        assert not device.queue, "steps are left to do when the completions are handed over"
    assert max(device.behind) == sampler_file.AHEAD
    device.behind.clear()
    sampler_of(policy, ahead=False, window=4).generate(PROMPTS, params, group_size=3)
    assert max(device.behind) == 0


requests = st.fixed_dictionaries({
    "prompts": st.lists(st.integers(1, 40), min_size=1, max_size=5),
    "group_size": st.integers(1, 4),
    "more_rows": st.integers(0, 9),
    "blocks": st.integers(4, 14),
    "window": st.integers(1, 20),
    "ahead": st.integers(1, 20),
    "max_tokens": st.integers(1, 23),
    "stops": st.integers(0, 60),
    "stop": st.sampled_from([(), ("a",), ("bc", "k")]),
    "kept": st.booleans(),
})  # fmt: skip


@given(requests)
def test_any_request_completes_as_step_by_step(policy, asked):
    prompts = [[(7 * i + j) % 90 for j in range(length)] for i, length in enumerate(asked["prompts"])]
    size = asked["group_size"]
    params = SamplingParams(
        max_tokens=asked["max_tokens"], seed=1, stop_token_ids=tuple(range(30, 30 + asked["stops"])),
        stop=asked["stop"],
    )  # fmt: skip
    expected = Sampler(policy).generate(prompts, params, group_size=size)
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = LateDevice(monkeypatch)
        monkeypatch.setattr(sampler_file, "AHEAD", asked["ahead"])
        sampler = sampler_of(
            policy, kept=asked["kept"], max_batch=size + asked["more_rows"], window=asked["window"],
            kv_tokens=16 * asked["blocks"],
        )  # fmt: skip
        results = sampler.generate(prompts, params, group_size=size)
        assert not device.queue
    for ours, theirs in zip(results, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            # the CPU's products of other numbers of rows may sum in another order
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)


def test_little_memory_preempts_while_looking_ahead(policy, monkeypatch):
    preemptions, preempt = [], Scheduler._preempt
    monkeypatch.setattr(
        Scheduler, "_preempt", lambda self, for_group: (preemptions.append(1), preempt(self, for_group))
    )
    device, params = LateDevice(monkeypatch), SamplingParams(max_tokens=24, seed=11)
    expected = Sampler(policy).generate(PROMPTS, params, group_size=4)
    device.behind.clear()
    for blocks, window in ((4, 3), (5, 16), (7, 3), (11, 8), (16, 4)):
        results = sampler_of(policy, kv_tokens=16 * blocks, window=window).generate(
            PROMPTS, params, group_size=4
        )
        assert [[c.token_ids for c in g] for g in results] == [[c.token_ids for c in g] for g in expected]
    assert len(preemptions) > 10 and max(device.behind) > 0, "the caches were too large, or too small"


@pytest.mark.parametrize("options", OPTIONS + [{"temperature": 0}, {"temperature": 0, "top_k": 3}], ids=str)
def test_slices_of_the_vocabulary_draw_the_same(policy, options, monkeypatch):
    params = SamplingParams(max_tokens=12, seed=5, **options)
    expected = sampler_of(policy).generate(PROMPTS, params, group_size=3)
    sampler, sliced, draw = sampler_of(policy), [], sampling.sample_from_head
    monkeypatch.setattr(sampling, "sample_from_head", lambda *a, **k: (sliced.append(1), draw(*a, **k))[1])
    sampler.decoder.draw.most_whole = 4
    results = sampler.generate(PROMPTS, params, group_size=3)
    assert bool(sliced) == sampler.decoder.draw.plain
    for ours, theirs in zip(results, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids == b.token_ids
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [(), ("ab", "c")])
def test_streams_do_not_change(policy, stop, monkeypatch):
    params = SamplingParams(max_tokens=20, seed=1, stop=stop)
    expected = Sampler(policy).generate(PROMPTS, params, group_size=3)
    LateDevice(monkeypatch)
    pieces = {}

    def on_text(prompt, member, piece):
        pieces.setdefault((prompt, member), []).append(piece)

    sampler_of(policy, window=6).generate(PROMPTS, params, group_size=3, on_text=on_text)
    for prompt, group in enumerate(expected):
        for member, completion in enumerate(group):
            assert "".join(pieces.get((prompt, member), [])) == completion.text


def test_block_tables_grow_wider_without_a_look(policy, monkeypatch):
    prompts = [[(5 * i) % 90 for i in range(240)], [3, 4], [7]]
    params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True, repetition_penalty=1.2)
    expected = Sampler(policy).generate(prompts, params, group_size=3)
    LateDevice(monkeypatch)
    widths, move, runs, make = [], DecodeRun.move, [], DecodeRun.__init__

    def watched_move(run, state, step):
        widths.append((run.state.width, state.width))
        move(run, state, step)

    monkeypatch.setattr(DecodeRun, "move", watched_move)
    monkeypatch.setattr(DecodeRun, "__init__", lambda run, *a: (runs.append(run), make(run, *a))[1])
    for kept in (False, True):
        results = sampler_of(policy, window=8, kept=kept).generate(prompts, params, group_size=3)
        assert [[c.token_ids for c in g] for g in results] == [[c.token_ids for c in g] for g in expected]
    assert widths == [(16, 64)] * 2 and len(runs) == 2


def test_no_step_is_launched_beyond_the_longest_completion(policy, monkeypatch):
    steps, advance = [], DecodeRun.advance
    monkeypatch.setattr(DecodeRun, "advance", lambda run, n: (steps.append(n), advance(run, n))[1])
    for max_tokens, window in ((1, 4), (2, 4), (6, 4), (23, 4), (24, 16), (24, 50)):
        steps.clear()
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sampler_of(policy, window=window).generate(PROMPTS, params, group_size=2)
        assert sum(steps) == max_tokens - 1, "the first token is the prefill's"


def test_rows_that_ended_leave_for_a_smaller_batch(policy, monkeypatch):
    batches, make = [], DecodeState.__init__
    monkeypatch.setattr(
        DecodeState,
        "__init__",
        lambda self, batch, *a, **k: (batches.append(batch), make(self, batch, *a, **k))[1],
    )
    params = SamplingParams(max_tokens=60, seed=3, stop_token_ids=tuple(range(30, 34)))
    results = sampler_of(policy, window=4).generate(PROMPTS, params, group_size=4)
    assert len({len(c.token_ids) for g in results for c in g}) > 3
    assert batches[0] >= 16 and batches[-1] <= 4 and batches == sorted(batches, reverse=True)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 19])
def test_parts_of_the_state_are_aligned_and_apart(batch):
    state = DecodeState(batch, 16, 4, torch.device("cpu"))
    parts = [state.words, state.members, state.context_lens, state.step, state.table]
    state.inputs.fill_(-1)
    for value, part in enumerate(parts):
        assert part.data_ptr() % 16 == state.inputs.data_ptr() % 16 and part.is_contiguous()
        part.fill_(value)
    for value, part in enumerate(parts):
        assert (part == value).all(), "parts overlap"


def test_a_run_hands_over_rows_once_and_then_what_grew():
    sequences = [
        Sequence(3, 0, [1, 2, 3, 4], 3, 9, block_table=[7, 2]),
        Sequence(4, 1, [5, 6], 2, 9, block_table=[1]),
    ]
    state = DecodeState(4, 16, 3, torch.device("cpu"))

    def step():
        state.record[int(state.step)] = torch.arange(12).view(3, 4) + 100 * state.words[0]
        state.words[0] += 1
        state.step += 1

    run = DecodeRun(state, step, sequences, limit=6)
    run.open()
    assert state.words.tolist() == [[4, 6, 0, 0], [3, 1, -0, 0], [1, 0, 0, 0], [6, 6, 0, 0]]
    assert state.members.tolist() == [[3, 4, 0, 0], [0, 1, 0, 0]] and state.context_lens.tolist() == [
        4,
        2,
        0,
        0,
    ]
    assert state.table[:, :3].tolist() == [[7, 2, 0], [1, 0, 0], [0] * 3, [0] * 3]
    run.advance(2)
    run.advance(1)
    run.close()
    sequences[1].block_table += [9, 8]
    run.open()
    assert state.words[0].tolist() == [7, 9, 3, 3], "the rows' own state was written again"
    assert state.table[:2, :3].tolist() == [[7, 2, 0], [1, 9, 8]] and state.step.tolist() == [0]
    run.advance(1)
    assert (run.unread, run.steps) == (4, 1)
    tokens, logprobs, kept = run.read()
    assert tokens.tolist() == [[400, 601], [500, 701], [600, 801]] and tokens.dtype == np.int64
    assert logprobs[0].tolist() == [404, 605] and kept[2].tolist() == [608, 809]
    run.close()
    assert run.read()[0].tolist() == [[700, 901]] and run.unread == run.steps == 0


def test_a_cache_that_finds_no_room_takes_that_of_captured_steps(policy, monkeypatch):
    sampler, emptied, cleared, made = Sampler(policy, max_batch=4), [], [], []

    class Steps:
        def clear(self):
            cleared.append(self)

    def crowded(*arguments, **options):
        made.append((len(emptied), len(cleared)))
        if len(cleared) < 2:
            raise torch.OutOfMemoryError("no room")
        return make(*arguments, **options)

    make = decoding.KVCache
    expected = sampler.generate(PROMPTS[:1], SamplingParams(max_tokens=5), group_size=2)
    monkeypatch.setattr(decoding, "KVCache", crowded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(sampler.decoder, "graphs", Steps())
    monkeypatch.setattr(policy, "steps", Steps())
    cache = sampler.decoder.cache(3, 16)
    assert made == [(0, 0), (1, 0), (2, 2)] and cache.num_blocks == 3
    monkeypatch.undo()
    assert sampler.generate(PROMPTS[:1], SamplingParams(max_tokens=5), group_size=2) == expected
    monkeypatch.setattr(decoding, "KVCache", lambda *a, **o: crowded())
    cleared.clear()
    monkeypatch.setattr(policy, "steps", None)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.decoder.cache(3, 16)


def test_tables_have_few_widths_and_long_ones_little_to_spare():
    widths = [decoding._table_width(blocks) for blocks in range(1, 8193)]
    assert all(width >= blocks for blocks, width in enumerate(widths, 1)) and widths == sorted(widths)
    assert sorted(set(widths))[:6] == [16, 64, 256, 1024, 1536, 2048] and len(set(widths)) == 18
    assert all(width <= 1.5 * blocks for blocks, width in enumerate(widths, 1) if blocks > 1024)
