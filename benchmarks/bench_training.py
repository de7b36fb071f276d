"""A whole model's forward and backward pass to its adapters, NF4 base, layers recomputed: log-probs and gradients.

Beside it transformers' model with bitsandbytes' linears, PEFT's adapters and torch's checkpointing, which gets the
same sequences as a batch without padding. Where sequences share a prompt, the contender is the same pass without
sharing. Micro-batches are cut as the trainer cuts them, for all contenders, and their gradients added up. Where
gradients leave for the CPU's memory, the adapters are of the model's dtype, as the trainer then has them.
"""

import cases
import measurement
import peer_models
import policies
import pytest
import torch
from comparison import Error, Peer, distance
from float64_model import logprobs_in_float64, wide_parameters
from nanogrpo.grpo.master_weights import MasterWeights
from nanogrpo.rollout import split_by_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Plainly wrong: error of a log-prob; relative norm of the error of all gradients as one vector.
LIMITS = {"bfloat16": (0.5, 0.25), "float32": (1e-3, 1e-3)}


# Each adapter takes a ``Problem`` and returns step() -> (log-probs (S, C), gradients in the order of the adapters).


def ours(share_prefix=False, at_once=False):
    def load(problem):
        policy = problem.policy
        mask = torch.zeros(problem.ids.shape, dtype=torch.bool)
        mask[:, problem.prompt :] = True
        ids, parameters = problem.ids.cpu(), list(problem.trained.values())
        policy.model.checkpoint_layers = True
        if policy.steps is not None:
            policy.steps.clear()  # of other passes, so that all memory that this one takes is seen

        def score(rows):
            return policy.score(ids[rows], mask[rows], share_prefix=share_prefix)[:, problem.prompt :]

        budget = 0 if at_once else problem.budget
        return lambda: trained(problem, score, parameters, budget, share_prefix)

    return lambda: load


def transformers():
    def load(problem):
        model = peer_models.causal_lm(problem.policy).train()
        model.config._attn_implementation = "sdpa"
        model.gradient_checkpointing_enable({"use_reentrant": False})
        named = dict(model.named_parameters())
        parameters = [
            named[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
            for name in problem.policy.adapters()
        ]
        targets, dtype = problem.ids[:, problem.prompt :], problem.policy.dtype
        kept = targets.shape[1] + 1

        def score(rows):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                logits = model(problem.ids[rows], logits_to_keep=kept, use_cache=False).logits[:, :-1]
            return logits.float().log_softmax(-1).gather(2, targets[rows][..., None])[..., 0]

        return lambda: trained(problem, score, parameters, problem.budget)

    return load


def trained(problem, score, parameters, budget, share_prefix=False):
    """(log-probs, gradients) by ``score(rows)``, in micro-batches of ``budget`` tokens, 0: in one."""
    found, runs = [], [range(len(problem.ids))]
    if budget:
        runs = split_by_budget(problem.sequences, budget, share_prefix=share_prefix)
    for run in runs:
        rows = slice(run[0], run[-1] + 1)
        logprobs = score(rows)
        logprobs.backward(problem.upstream[rows])
        # The trainer reads a micro-batch's log-probs before it goes on to the next.
        found.append(logprobs.detach().cpu() if budget else logprobs.detach())
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(found), grads


THEIRS = Peer("transformers + PEFT + bitsandbytes", "peft", transformers, rounds=3)


def peers(training):
    if training.offload:
        return [Peer("ours", None, ours())]
    if training.shared:
        return [
            Peer("ours", None, ours(share_prefix=True)),
            Peer("ours, prompt repeated", None, ours()),
        ]
    at_once = [Peer("ours, all at once", None, ours(at_once=True))] if training.budget else []
    return [Peer("ours", None, ours()), *at_once, THEIRS]


class Problem:
    """Random ids, one prompt for all where it is shared, and a random gradient of every log-prob."""

    def __init__(self, training):
        adapters = "bfloat16" if training.offload and DEVICE == "cuda" else "float32"
        # A policy whose gradients have been led elsewhere is nobody else's.
        policy_of = policies.policy_of.__wrapped__ if training.offload else policies.policy_of
        self.policy = policy_of(training.model, "nf4", training.r, DEVICE, adapters, spread=0.01)
        self.trained = MasterWeights(self.policy).parameters if training.offload else self.policy.adapters()
        self.prompt, self.budget, vocab = training.prompt, training.budget, self.policy.config.vocab_size
        generator = torch.Generator(DEVICE).manual_seed(0)
        shape = training.sequences, training.length
        self.ids = torch.randint(vocab, shape, generator=generator, device=DEVICE)
        if training.shared:
            self.ids[:, : self.prompt] = self.ids[:1, : self.prompt]
        self.sequences = self.ids.tolist()
        completions = shape[0], shape[1] - self.prompt
        self.upstream = torch.randn(completions, generator=generator, device=DEVICE)

    def truth(self):
        """Log-probs and the gradients of the adapters, in float64."""
        wide = wide_parameters(self.policy.adapters().values())
        logprobs = logprobs_in_float64(self.policy, self.ids, self.prompt, wide)
        return logprobs.detach(), torch.autograd.grad(logprobs, list(wide.values()), self.upstream.double())


def facts(step):
    """Device time and memory of a later call of ours."""
    found = {}
    if DEVICE == "cuda":
        found["MiB above what stays between calls"] = measurement.peak_bytes(step, DEVICE) / 2**20
        times = measurement.kernel_times(step)
        found["ms of kernels"] = sum(time for time, _ in times.values()) / 1e3
        found["kernels"] = sum(count for _, count in times.values())
    return found


@pytest.fixture(scope="module", params=cases.training(DEVICE), ids=str)
def training(request):
    return request.param


def test_training(compare, training):
    problem, case, steps = Problem(training), training.case(DEVICE), {}
    logprobs, grads = problem.truth()
    whole, limits = flat(grads), LIMITS[case.dtype]

    def call(load):
        steps[load] = load(problem)
        return [steps[load]]

    def verify(result):
        got, got_grads = result
        return {
            "log-prob error": Error((got.to(DEVICE) - logprobs).abs().max().item(), limits[0]),
            "gradient error": distance(flat(got_grads).to(DEVICE), whole, limits[1]),
        }

    def facts_of_ours(contenders):
        """And what of its results changes where the prompt is shared."""
        first, *others = steps.values()
        found = facts(first)
        if training.shared and others:
            one, grads = first()
            grads = flat(grads)  # a copy: the next call may write where they lie
            other, other_grads = others[0]()
            found["max log-prob difference"] = (one - other).abs().max().item()
            found["relative gradient difference"] = distance(grads, flat(other_grads).double(), 1).value
        return found

    config, policy = problem.policy.config, problem.policy
    linears = sum(linear.weight.shape[0] * linear.weight.shape[1] for _, linear in policy.model.linears())
    adapted = sum(parameter.numel() for parameter in policy.adapters().values())
    S, L, P = training.sequences, training.length, training.prompt
    tokens = S * L - (S - 1) * P * training.shared
    pairs = S * L * L // 2 - (S - 1) * P * P // 2 * training.shared
    width = config.num_attention_heads * config.head_dim
    head = S * (L - P) * 4 * config.hidden_size * config.vocab_size
    compare(
        case, "forward + backward, recomputed", peers=peers(training), call=call, verify=verify,
        flops=tokens * (6 * linears + 8 * adapted) + 18 * pairs * width * config.num_hidden_layers + head,
        nbytes=3 * linears // 2 + policy.model.head.nbytes, work=("tokens", S * L), facts=facts_of_ours,
        rounds={"warmup": 1, "fewest": 5},
    )  # fmt: skip


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])
