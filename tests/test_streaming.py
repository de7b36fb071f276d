"""Streamed text: its pieces join to the completion's text and none is taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout import Sampler, SamplingParams
from nanogrpo.rollout.streaming import TextStream
from tiny import tiny_policy


def decode(token_ids):
    return bytes(token_ids).decode("utf-8", errors="replace")


@given(
    st.text(alphabet="ab\u00e9\u20ac\U0001f600", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_pieces_join_to_the_text_before_a_stop_string(text, stop):
    ids = list(text.encode())
    stream, shown = TextStream(decode, tuple(stop)), ""
    for end in range(1, len(ids) + 1):
        if any(s in decode(ids[:end]) for s in stop):
            ids = ids[:end]
            break
        shown += stream.grow(ids[:end])
    whole = decode(ids)
    cut = min((whole.index(s) for s in stop if s in whole), default=len(whole))
    assert whole[:cut].startswith(shown)
    assert shown + stream.finish(whole[:cut]) == whole[:cut]


def test_a_character_appears_when_its_last_byte_does():
    stream, ids = TextStream(decode), list("\u20ac!".encode())
    assert [stream.grow(ids[:n]) for n in (1, 2, 3, 4)] == ["", "", "\u20ac", "!"]


def test_a_possible_stop_is_held_back():
    stream = TextStream(decode, ("END",))
    assert [stream.grow(list(s.encode())) for s in ("aE", "aEN", "aENx")] == ["a", "", "ENx"]


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("stop", [(), ("ab", "c")])
def test_the_sampler_streams_every_member(stop, window):
    policy, pieces = tiny_policy(eos_token_ids=(5,)), {}
    params = SamplingParams(max_tokens=20, seed=1, stop=stop)

    def on_text(*where_and_piece):
        *where, piece = where_and_piece
        assert piece
        pieces.setdefault(tuple(where), []).append(piece)

    prompts = [[1, 2, 3], [4, 6]]
    results = Sampler(policy, window=window).generate(prompts, params, group_size=3, on_text=on_text)
    silent = Sampler(policy).generate(prompts, params, group_size=3)
    assert [c.text for group in results for c in group] == [c.text for group in silent for c in group]
    for prompt, group in enumerate(results):
        for member, completion in enumerate(group):
            assert "".join(pieces.get((prompt, member), [])) == completion.text
    assert max(map(len, pieces.values())) > (3 if window == 1 else 1)
