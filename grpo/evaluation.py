"""How good a policy is on held-out questions, and how sure that figure is."""

import math
from dataclasses import dataclass

from ..rollout import Sampler, SamplingParams


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``count`` replies were right."""

    correct: int
    count: int

    @property
    def value(self):
        return self.correct / self.count

    def wilson(self, z=1.959964):
        """The Wilson score interval (low, high), 95% by default (Wilson 1927)."""
        n, p = self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self):
        low, high = self.wilson()
        return f"{self.value:.1%} ({self.correct}/{self.count}, 95% interval {low:.1%} to {high:.1%})"


def evaluate(policy, examples, *, max_tokens, max_batch=64):
    """Greedy replies to ``examples``: (``Accuracy``, the completions in order)."""
    prompts = [policy.tokenizer.apply_chat_template(list(example.messages)) for example in examples]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    groups = Sampler(policy, max_batch=max_batch).generate(prompts, params, group_size=1)
    completions = [group[0] for group in groups]
    pairs = zip(completions, examples, strict=True)
    correct = sum(c.finish_reason == "stop" and e.accepts(c.text) for c, e in pairs)
    return Accuracy(correct, len(examples)), completions
