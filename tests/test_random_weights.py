"""Random weights: the published shapes, weights that repeat, activations that stay finite."""

import math

import pytest
import torch
from nanogrpo.rollout import LoraConfig, Sampler, SamplingParams
from nanogrpo.rollout.checkpoint import expected_tensors, open_checkpoint, resolve_checkpoint
from nanogrpo.rollout.random_weights import SHAPES, find_shape, random_policy

TINY = [name for name in SHAPES if name.startswith("tiny")]
# Parameters as the models' pages on the hub count them.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "Phi-4": 14_659_507_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    assert sum(math.prod(shape) for shape in expected_tensors(SHAPES[name]).values()) == PUBLISHED[name]


def test_every_shape_is_published_or_tiny():
    assert set(SHAPES) == set(PUBLISHED) | set(TINY)


def test_the_tokenizer_fits_every_vocabulary():
    tokenizer = open_checkpoint(resolve_checkpoint()).tokenizer
    largest = max(tokenizer.encode("".join(map(chr, range(32, 0x2000)))) + list(tokenizer.eos_token_ids))
    assert largest < min(config.vocab_size for config in SHAPES.values())
    assert min(config.vocab_size for config in SHAPES.values()) == 49152  # SmolLM2's own


def test_names_in_any_case():
    assert find_shape("qwen2.5-1.5b") == ("Qwen2.5-1.5B", SHAPES["Qwen2.5-1.5B"])
    with pytest.raises(ValueError, match="unknown shape 'llama-3.1-9b'; nearest is 'llama-3.1-8b'"):
        find_shape("llama-3.1-9b")


@pytest.mark.parametrize("quantize", [None, "nf4", "int4"])
@pytest.mark.parametrize("name", TINY)
def test_it_speaks_and_learns(name, quantize):
    policy = random_policy(name, quantize, LoraConfig(r=2, alpha=2), "cpu")
    prompt = policy.tokenizer.encode("Which number is larger, 4 or 7?")
    [group] = Sampler(policy).generate([prompt], SamplingParams(max_tokens=6, seed=1), group_size=3)
    assert all(len(c.token_ids) == 6 and c.finish_reason == "length" for c in group)
    logprobs = torch.tensor([c.logprobs for c in group])
    # Logits of standard deviation 0.02 sqrt(hidden) leave the distribution near uniform over the vocabulary.
    assert (logprobs + math.log(policy.config.vocab_size)).abs().max() < 1
    sequence = torch.tensor(prompt + group[0].token_ids)
    mask = torch.arange(len(sequence)) >= len(prompt)
    scored = policy.score(sequence, mask)
    torch.testing.assert_close(scored[mask], logprobs[0], atol=1e-5, rtol=0)
    scored.sum().backward()
    gradients = [p.grad for n, p in policy.adapters().items() if "lora_B" in n]
    assert gradients and all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_weights_repeat_by_seed():
    lora = LoraConfig(r=2, alpha=2)
    one, same, other = (random_policy("tiny-llama", None, lora, "cpu", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.model.embedding, same.model.embedding)
    assert not torch.equal(one.model.embedding, other.model.embedding)
    first = lambda policy: next(iter(policy.adapters().values()))
    assert torch.equal(first(one), first(same)) and not torch.equal(first(one), first(other))
    sample = one.model.embedding
    assert abs(sample.std().item() - 0.02) < 1e-4 and abs(sample.mean().item()) < 1e-4


def test_quantised_weights_are_other_weights():
    ids, mask = torch.arange(9), torch.arange(9) > 0
    scored = [random_policy("tiny-llama", q, None, "cpu").score(ids, mask) for q in (None, "nf4", "int4")]
    assert len({tuple(logprobs.tolist()) for logprobs in scored}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(dtype):
    assert random_policy("tiny-qwen2", None, None, "cpu", dtype).dtype == dtype


def test_bad_format():
    with pytest.raises(ValueError, match="quantize must be .*, got 'int8'"):
        random_policy("tiny-llama", "int8")


@pytest.mark.gpu
def test_the_peak_stays_near_the_final_size():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = random_policy("llama-3.2-1b", "nf4", LoraConfig(r=16, alpha=16), "cuda")
    final, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    config = policy.config
    largest_linear = 2 * config.hidden_size * config.intermediate_size
    # One dense linear and the quantiser's chunks of 4 million values, each in a few float32 and int64 copies.
    assert peak <= final + 2 * largest_linear + 256 * 2**20
