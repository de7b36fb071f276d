"""Tokens per second of ``Sampler.generate``: wall time of the whole call, prefill, sampling and log-probs included.

Random weights and ids; every completion has the same length. Beside it transformers' ``generate`` and
``generate_batch`` on the same values, which return no log-probs. vLLM pins a torch of its own and cannot stand in
this process.
"""

import functools
import gc
import time

import cases
import measurement
import peer_models
import policies
import pytest
import torch
from comparison import Error, Peer
from nanogrpo.rollout import Sampler, SamplingParams
from nanogrpo.rollout.kv_cache import KVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A log-prob off by more is plainly wrong. bitsandbytes decodes in bfloat16 on the CPU whatever the dtype.
LIMITS = {"bfloat16": 0.25, "float32": 0.01}
PROFILED = 48, 16  # tokens: the difference of two calls is decode steps alone, whatever the prefill takes


# Each adapter takes a policy and a ``Problem`` and returns generate() -> (completions in order, score): score(row),
# not timed, are the log-probs of a row's tokens as the contender has them.


def ours(policy, problem):
    sampler = Sampler(policy, max_batch=problem.sizes["B"])

    def generate():
        completions = [completion for group in problem.sample(sampler) for completion in group]
        return [c.token_ids for c in completions], lambda row: torch.tensor(completions[row].logprobs)

    return generate


def transformers(batched):
    def load(policy, problem):
        from transformers import GenerationConfig

        model, C = peer_models.causal_lm(policy).eval(), problem.sizes["completion"]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(policy.dtype)  # what rollouts would be made with
        settings = lambda tokens: GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens,
            eos_token_id=-1 if batched else None, pad_token_id=0,
        )  # fmt: skip
        prompts = problem.repeated()

        @torch.no_grad()
        def score(tokens, row):
            ids = torch.tensor([[*prompts[row], *tokens[row]]], device=DEVICE)
            log_p = model(ids, logits_to_keep=C + 1).logits[0, :-1].float().log_softmax(-1)
            return log_p.gather(1, ids[0, -C:, None])[:, 0]

        @torch.no_grad()
        def generate(length=C):
            if batched:
                found = model.generate_batch(
                    inputs=prompts, generation_config=settings(length), progress_bar=False
                )
                tokens = [output.generated_tokens for output in found.values()]
            else:
                ids = torch.tensor(prompts, device=DEVICE)
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings(length)
                )
                tokens = found[:, ids.shape[1] :].tolist()
            return tokens, functools.partial(score, tokens)

        generate(4)  # its one call that counts is not its first
        return generate

    return lambda: load


PEERS = [
    Peer("ours", None, lambda: ours),
    Peer("transformers generate", "transformers", transformers(batched=False), rounds=1),
    Peer("transformers generate_batch", "transformers", transformers(batched=True), cuda_only=True, rounds=1),
]


class Problem:
    """Prompts of random ids, a group of completions each."""

    def __init__(self, policy, sizes):
        generator = torch.Generator().manual_seed(0)
        size = sizes["B"] // sizes["group"], sizes["prompt"]
        self.prompts = torch.randint(policy.config.vocab_size, size, generator=generator).tolist()
        self.sizes = sizes

    def repeated(self):
        return [prompt for prompt in self.prompts for _ in range(self.sizes["group"])]

    def sample(self, sampler, tokens=None):
        params = SamplingParams(max_tokens=tokens or self.sizes["completion"], ignore_eos=True)
        return sampler.generate(self.prompts, params, group_size=self.sizes["group"])

    def kv_bytes(self, policy, page=16):
        """Of the blocks that hold every prompt once and every completion."""
        B, group, prompt, completion = (self.sizes[name] for name in ("B", "group", "prompt", "completion"))
        shared = prompt // page
        blocks = B // group * shared + B * (-(-(prompt + completion) // page) - shared)
        return blocks * KVCache.bytes_per_block(policy.config, page, policy.dtype)


def policy_of(model, quantize, r):
    """With adapters in the dtype that rollouts read: a trainer may keep float32 originals elsewhere.

    They change outputs as much as trained ones do, not so much that roundings grow from layer to layer.
    """
    return policies.policy_of(
        model, quantize, r, DEVICE, "bfloat16" if DEVICE == "cuda" else "float32", spread=0.02
    )


def facts(policy, problem):
    """Memory and first call of a new sampler; on a GPU what its kernels take in one decode step."""
    gc.collect()
    kv = problem.kv_bytes(policy)
    found = {"MiB of keys and values": kv / 2**20}
    sampler = Sampler(policy, max_batch=problem.sizes["B"])
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    start = time.perf_counter()
    problem.sample(sampler)
    found["seconds of a first call"] = time.perf_counter() - start
    if DEVICE == "cuda":
        beyond = torch.cuda.max_memory_reserved() - before - kv
        found["MiB beyond weights, keys and values"] = beyond / 2**20
    if DEVICE == "cuda" and policy.lora and problem.sizes["completion"] == 200:
        more, fewer = PROFILED
        whole, part = (measurement.kernel_times(lambda n=n: problem.sample(sampler, n)) for n in PROFILED)
        a_step = lambda name, i: (whole[name][i] - part.get(name, (0, 0))[i]) / (more - fewer)
        found["kernels of a decode step"] = sum(a_step(name, 1) for name in whole)
        times = {name: a_step(name, 0) for name in whole}
        found["µs of a decode step's kernels, which overlap"] = {n: t for n, t in times.items() if t > 0.1}
    return found


@pytest.fixture(
    scope="module", params=cases.generate(DEVICE), ids=lambda rollout: f"{rollout}, {rollout.sizes}"
)
def rollout(request):
    return request.param


def test_generate(compare, rollout):
    measure(compare, rollout, PEERS[:1])


def test_generate_beside_transformers(compare):
    """The first case again with every peer: a call of theirs takes many seconds."""
    measure(compare, cases.generate(DEVICE)[0], PEERS)


def measure(compare, rollout, peers):
    policy, sizes = policy_of(*rollout[:3]), rollout.sizes
    problem, case = Problem(policy, sizes), rollout.case(DEVICE, "{B} completions of {completion} tokens")
    B, C, prompts = sizes["B"], sizes["completion"], problem.repeated()

    def verify(result):
        tokens, score = result
        missing = B - len(tokens) + sum(len(row) != C for row in tokens)
        errors = {"incomplete": Error(missing, 0), "log-prob error": Error(0.0, LIMITS[case.dtype])}
        for row in () if missing else (0, B // 2, B - 1):
            ids = torch.tensor([*prompts[row], *tokens[row]])
            with torch.no_grad():
                truth = policy.score(ids, torch.arange(len(ids)) >= len(prompts[row]))[-C:].cpu()
            error = (score(row).cpu() - truth).abs().max().item()
            errors["log-prob error"] = Error(max(error, errors["log-prob error"].value), LIMITS[case.dtype])
        return errors

    weights = [linear.weight for _, linear in policy.model.linears()] + [policy.model.head]
    elements = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    read = sum(tensor.nbytes for tensor in (*weights, *policy.adapters().values()))
    tokens_read = C * B // sizes["group"] * sizes["prompt"] + B * C * (C - 1) // 2  # prompts once a group
    kept = KVCache.bytes_per_block(policy.config, 1, policy.dtype)
    compare(
        case, "whole call", peers=peers, verify=verify,
        call=lambda load: [load(policy, problem)],
        flops=2 * B * C * elements, nbytes=C * read + tokens_read * kept, work=("tokens", B * C),
        facts=lambda contenders: facts(policy, problem), rounds={"warmup": 0, "fewest": 2 if C > 200 else 3},
    )  # fmt: skip
