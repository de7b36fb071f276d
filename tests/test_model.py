"""The transformer against transformers' own classes on the same random weights."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import small_config
from nanogrpo.rollout import LoraConfig, pack_tree
from nanogrpo.rollout.attention import TreeAttention
from nanogrpo.rollout.model import rotary_frequencies
from tiny import LLAMA3_ROPE, tiny_policy, tiny_weights, transformers_model, transformers_weights

CONFIGS = {
    "llama": small_config(),
    "llama, tied": small_config(tie_word_embeddings=True),
    "llama, wide heads, one KV head": small_config(num_key_value_heads=1, head_dim=32, rope_theta=5e5),
    "llama 3 rope": small_config(rope_scaling=LLAMA3_ROPE, head_dim=32),
    "qwen2": small_config("qwen2", rms_norm_eps=1e-5),
    "qwen2, tied": small_config("qwen2", tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": small_config("qwen3", head_dim=32, rope_theta=1e6),
    "qwen3, tied": small_config("qwen3", tie_word_embeddings=True),
    "phi3": small_config("phi3", rope_theta=2.5e5, rms_norm_eps=1e-5),
}


def random_ids(*shape, seed=0):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, tree):
    return model.logits(model(tree.input_ids, tree.positions, TreeAttention(tree.key_end)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [1, 7, 100])
def test_logits_equal_transformers(config, length):
    weights, ids = tiny_weights(config), random_ids(length)
    with torch.no_grad():
        ours = logits_of(tiny_policy(config, weights).model, pack_tree([ids.tolist()]))
        theirs = transformers_model(config, weights)(ids[None]).logits[0]
    assert theirs.std() > 0.5, "the comparison needs logits of an ordinary scale"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)  # float32 sums in another order


def test_llama3_scaling_leaves_high_frequencies_and_slows_low_ones():
    plain = rotary_frequencies(small_config(head_dim=64))
    scaled = rotary_frequencies(small_config(head_dim=64, rope_scaling=LLAMA3_ROPE))
    torch.testing.assert_close(scaled[0], plain[0], atol=0, rtol=0)
    torch.testing.assert_close(scaled[-1], plain[-1] / LLAMA3_ROPE["factor"])
    assert (scaled <= plain).all() and ((scaled < plain) & (scaled > plain / LLAMA3_ROPE["factor"])).any()


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_sequences_equal_separate_ones(share_prefix):
    model = tiny_policy().model
    prompt = random_ids(20).tolist()
    sequences = [prompt + random_ids(n, seed=n).tolist() for n in (5, 17, 30)] + [
        random_ids(9, seed=1).tolist()
    ]
    tree = pack_tree(sequences, share_prefix=share_prefix)
    with torch.no_grad():
        packed = logits_of(model, tree)[tree.node]
        separate = torch.cat([logits_of(model, pack_tree([s])) for s in sequences])
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)


def gradients(policy, ids):
    for parameter in policy.adapters().values():
        parameter.grad = None
    tree = pack_tree([ids.tolist()])
    logits = logits_of(policy.model, tree)
    loss = F.cross_entropy(logits[:-1], ids[1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.adapters().items()}


def test_checkpointed_layers_give_the_same_gradients(monkeypatch):
    policy, ids = tiny_policy(lora=LoraConfig(r=4)), random_ids(50)
    calls = []
    layer = policy.model.layers[0]
    monkeypatch.setattr(layer, "forward", lambda *a, f=layer.forward: (calls.append(1), f(*a))[1])
    loss, expected = gradients(policy, ids)
    assert len(calls) == 1 and all(grad.abs().max() > 0 for grad in expected.values())
    policy.model.checkpoint_layers = True
    again, recomputed = gradients(policy, ids)
    assert len(calls) == 3, "the layer was not computed a second time"
    assert torch.equal(loss, again)
    for name, grad in expected.items():
        torch.testing.assert_close(recomputed[name], grad, atol=0, rtol=0)


@pytest.mark.gpu
def test_offloaded_checkpoints_give_the_same_gradients():
    config, ids = small_config("qwen2", num_hidden_layers=5), random_ids(100).cuda()
    weights = {name: tensor.cuda().bfloat16() for name, tensor in tiny_weights(config).items()}
    policy = tiny_policy(config, weights)
    policy.add_adapters(LoraConfig(r=4))
    for parameter in policy.adapters().values():
        parameter.data.normal_(std=0.1)
    tree = pack_tree([ids.tolist()]).to("cuda")
    found = []
    for checkpointed, offloaded in ((False, False), (True, False), (True, True)):
        policy.model.checkpoint_layers, policy.model.offload_checkpoints = checkpointed, offloaded
        hidden_states = policy.model(tree.input_ids, tree.positions, TreeAttention(tree.key_end))
        loss = hidden_states.float().square().sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(policy.adapters().values()))])
    for got in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(got, found[0], strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_adapter_gradients_equal_autograd_of_merged_weights(architecture):
    """The chain rule of W + scaling B A on transformers' dense model, through the whole network."""
    config, ids = small_config(architecture), random_ids(40)
    weights = tiny_weights(config)
    policy = tiny_policy(config, weights, lora=LoraConfig(r=4, alpha=8))
    loss, grads = gradients(policy, ids)
    factors, merged = {}, dict(weights)
    for name, linear in policy.model.projections():
        a, b = (x.detach().clone().requires_grad_() for x in (linear.lora_a, linear.lora_b))
        factors[name] = a, b
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + 2.0 * b @ a
    model = transformers_model(config, weights)
    merged = transformers_weights(config, merged)
    theirs = torch.func.functional_call(model, merged, (ids[None],)).logits[0]
    expected = F.cross_entropy(theirs[:-1], ids[1:])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    for name, (a, b) in factors.items():
        for kind, factor in (("A", a), ("B", b)):
            grad = grads[f"base_model.model.{name}.lora_{kind}.weight"]
            assert (grad - factor.grad).norm() <= 1e-4 * factor.grad.norm(), f"{name} {kind}"


def test_logits_of_few_rows_equal_those_among_many():
    model = tiny_policy().model
    hidden = torch.randn(40, 64)
    whole = model.logits(hidden)
    for n in (1, 2, 15, 16, 17):
        assert torch.equal(model.logits(hidden[:n]), whole[:n])
    assert whole.dtype == torch.float32 and model.logits(hidden[:0]).shape == (0, 96)
