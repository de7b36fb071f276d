"""Accuracy with its interval, and greedy evaluation."""

import pytest
import torch
from nanogrpo.grpo.evaluation import Accuracy, evaluate
from nanogrpo.grpo.tasks import TASKS, Example
from tiny_run import tiny_policy


# 0 and n of n have closed forms, z^2 / (n + z^2) and n / (n + z^2); 8/10 and 81/263 are textbook figures (the
# latter of Newcombe, Statistics in Medicine 17, 1998).
@pytest.mark.parametrize(
    "correct, count, low, high",
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94332),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (5, 10, 0.23659, 0.76341),
    ],
)
def test_wilson(correct, count, low, high):
    assert Accuracy(correct, count).wilson() == pytest.approx((low, high), abs=6e-5)


def test_wilson_solves_its_equation():
    z = 1.959964
    for bound in Accuracy(31, 200).wilson():
        assert (31 / 200 - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / 200, rel=1e-9)


def test_text():
    assert str(Accuracy(8, 10)) == "80.0% (8/10, 95% interval 49.0% to 94.3%)"


def greedy(policy, prompt, count):
    """The definition: the most likely next token of the whole sequence, again and again."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor(ids)
        # Every possible next token is scored after the same prefix.
        rows = torch.cat([row.expand(96, -1), torch.arange(96)[:, None]], dim=1)
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        mask[:, -1] = True
        with torch.no_grad():
            ids.append(policy.score(rows, mask)[:, -1].argmax().item())
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def test_evaluate_is_greedy_and_counts_exact_replies():
    policy = tiny_policy()
    examples = TASKS["larger"].draw_each([(3, 42), (5, 6), (70, 80)], "k")
    accuracy, completions = evaluate(policy, examples, max_tokens=3)
    assert accuracy.count == 3 and accuracy.correct == 0
    prompts = [policy.tokenizer.apply_chat_template(list(e.messages)) for e in examples]
    assert [c.token_ids for c in completions] == [greedy(policy, p, 3) for p in prompts]


def test_a_reply_must_have_ended_to_count():
    policy = tiny_policy()
    messages = TASKS["larger"].example((3, 42)).messages
    first = evaluate(policy, [Example(messages, "", 0, ())], max_tokens=2)[1][0]
    expected = Example(messages, first.text.strip(), 0, ())
    assert first.finish_reason == "length"
    assert evaluate(policy, [expected], max_tokens=2)[0].correct == 0
    policy.tokenizer.eos_token_ids = (first.token_ids[-1],)
    assert evaluate(policy, [expected], max_tokens=2)[0].correct == 1
