"""Scoring, adapters and quantised bases, against transformers and PEFT."""

import json

import pytest
import torch
from checkpoints import small_config
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit
from nanogrpo.rollout import LoraConfig, Policy, open_checkpoint, resolve_checkpoint
from nanogrpo.rollout.linear import LINEARS
from nanogrpo.rollout.policy import _place
from safetensors.torch import load_file, save_file
from tiny import perturb_adapters, tiny_policy, tiny_weights, transformers_model


def random_ids(*shape, seed=0):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def group_batch(prompt=20, completion=12, rows=6):
    """(B, T) ids of a group: one prompt, different completions; and the mask of the completions."""
    ids = torch.cat([random_ids(1, prompt).expand(rows, -1), random_ids(rows, completion, seed=1)], dim=1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt:] = True
    mask[0, -3:] = False
    return ids, mask


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_equals_transformers(architecture, temperature):
    config = small_config(architecture)
    weights, (ids, mask) = tiny_weights(config), group_batch()
    policy = tiny_policy(config, weights)
    with torch.no_grad():
        logprobs, entropy = policy.score(ids, mask, temperature=temperature, return_entropy=True)
        full = (transformers_model(config, weights)(ids).logits / temperature).log_softmax(-1)[:, :-1]
    expected = torch.zeros(ids.shape)
    expected[:, 1:] = full.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected * mask, atol=1e-4, rtol=1e-4)
    expected[:, 1:] = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(entropy, expected * mask, atol=1e-4, rtol=1e-4)
    assert logprobs.dtype == torch.float32 and (logprobs[mask] < 0).all()
    assert torch.equal(policy.score(ids, mask, temperature=temperature), logprobs)


def test_flat_and_rectangular_input_agree():
    policy, (ids, mask) = tiny_policy(), group_batch()
    table = policy.score(ids, mask)
    borders = torch.arange(7) * ids.shape[1]
    flat = policy.score(ids.flatten(), mask.flatten(), cu_seqlens=borders)
    assert torch.equal(flat.view_as(table), table)
    alone = policy.score(ids[2], mask[2])
    torch.testing.assert_close(alone, table[2], atol=1e-5, rtol=1e-5)


def score_and_gradients(policy, ids, mask, **options):
    logprobs = policy.score(ids, mask, **options)
    signs = torch.linspace(-1, 1, mask.numel()).view_as(logprobs)
    (signs * logprobs).sum().backward()
    grads = {name: parameter.grad for name, parameter in policy.adapters().items()}
    for parameter in policy.adapters().values():
        parameter.grad = None
    return logprobs.detach(), grads


def test_sharing_prefixes_changes_neither_values_nor_gradients():
    policy, (ids, mask) = tiny_policy(lora=LoraConfig(r=4)), group_batch()
    ids = torch.cat([ids, random_ids(1, ids.shape[1], seed=5), ids[:1]])  # a stranger and a repeated row
    mask = torch.cat([mask, mask[:1], mask[1:2]])
    shared, grads = score_and_gradients(policy, ids, mask)
    apart, expected = score_and_gradients(policy, ids, mask, share_prefix=False)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-5)
    for name, grad in expected.items():
        assert grad.norm() > 0 and (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_nothing_to_score():
    policy, (ids, mask) = tiny_policy(lora=LoraConfig(r=2)), group_batch()
    out = policy.score(ids, torch.zeros_like(mask))
    assert torch.equal(out, torch.zeros(ids.shape))


def test_bad_scoring_input():
    policy, (ids, mask) = tiny_policy(), group_batch()
    with pytest.raises(ValueError, match="completion_mask has shape"):
        policy.score(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="marks the first token"):
        policy.score(ids, torch.ones_like(mask))
    for borders in ([1, 192], [0, 191], [0, 100, 50, 192]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 192"):
            policy.score(ids.flatten(), mask.flatten(), cu_seqlens=torch.tensor(borders))


def test_fresh_adapters_change_nothing_and_are_seeded():
    base, (ids, mask) = tiny_policy(), group_batch()
    expected = base.score(ids, mask)
    first, second, third = tiny_policy(), tiny_policy(), tiny_policy()
    for policy, seed in ((first, 0), (second, 0), (third, 1)):
        policy.add_adapters(LoraConfig(r=4), seed=seed)
        torch.testing.assert_close(policy.score(ids, mask), expected, atol=1e-6, rtol=1e-6)
    a, b, c = (p.adapters() for p in (first, second, third))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if "lora_A" in name)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in a.values())
    assert len(a) == 2 * 2 * len(LINEARS)


def test_adapters_in_the_models_dtype_are_float32_ones_rounded():
    ids, mask = group_batch()
    weights = {name: tensor.bfloat16() for name, tensor in tiny_weights(small_config()).items()}
    policies = [tiny_policy(weights=weights, lora=LoraConfig(r=4, dtype=d)) for d in ("bfloat16", "float32")]
    half, full = (policy.adapters() for policy in policies)
    for name, parameter in half.items():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        full[name].data.copy_(parameter)
    (logprobs, grads), (expected, wide) = (score_and_gradients(policy, ids, mask) for policy in policies)
    assert torch.equal(logprobs, expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.bfloat16 and torch.equal(grad, wide[name].bfloat16()), name


def test_adapters_of_another_half_precision_are_refused():
    with pytest.raises(
        ValueError, match="LoRA dtype must be float32 or the model's torch.float32, got torch.b"
    ):
        tiny_policy(lora=LoraConfig(r=4, dtype="bfloat16"))


def test_disable_adapters_is_the_base_and_restores():
    policy, (ids, mask) = tiny_policy(lora=LoraConfig(r=4)), group_batch()
    expected, before = tiny_policy().score(ids, mask), policy.score(ids, mask)
    assert (expected - before).abs().max() > 0.1
    with policy.disable_adapters() as inside:
        assert inside is policy and torch.equal(policy.score(ids, mask), expected)
        with policy.disable_adapters():
            pass
        assert torch.equal(policy.score(ids, mask), expected), "the inner context switched adapters on"
    with pytest.raises(RuntimeError), policy.disable_adapters():
        raise RuntimeError
    assert torch.equal(policy.score(ids, mask), before)


PEFT_CASES = [
    ("llama", LINEARS),
    ("llama", ("q_proj", "v_proj")),
    ("qwen3", LINEARS),
    ("phi3", LINEARS),
    ("phi3", ("o_proj", "gate_proj", "up_proj")),
]


@pytest.mark.parametrize("architecture, targets", PEFT_CASES)
def test_peft_reads_our_adapters_and_we_read_theirs(tmp_path, architecture, targets):
    import peft

    config, (ids, mask) = small_config(architecture), group_batch()
    weights, lora = tiny_weights(config), LoraConfig(r=4, alpha=8, targets=targets)
    policy = tiny_policy(config, weights, lora=lora)
    policy.save_adapter(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(transformers_model(config, weights), tmp_path / "ours")
    with torch.no_grad():
        full = theirs(ids).logits.log_softmax(-1)[:, :-1]
        expected = full.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        scores = policy.score(ids, mask)
    torch.testing.assert_close(scores[:, 1:], expected, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    # Loading replaces whatever adapters are there: none, or others of another rank on other linears.
    for other in (None, LoraConfig(r=2), LoraConfig(r=8, targets=("o_proj",))):
        loaded = tiny_policy(config, weights, lora=other)
        loaded.load_adapter(tmp_path / "theirs")
        assert loaded.lora.r == 4 and loaded.lora.alpha == 8 and set(loaded.lora.targets) == set(targets)
        assert torch.equal(loaded.score(ids, mask).detach(), scores)
        assert loaded.adapters().keys() == policy.adapters().keys()
        assert all(torch.equal(t, policy.adapters()[n]) for n, t in loaded.adapters().items())


def test_an_adapter_that_peft_trained_on_a_fused_projection(tmp_path):
    """One lora_a for q, k and v together: each of our three gets it, with its own rows of lora_b."""
    import peft

    config, (ids, mask) = small_config("phi3"), group_batch()
    weights = tiny_weights(config)
    lora = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(transformers_model(config, weights), lora)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    policy = tiny_policy(config, weights)
    policy.load_adapter(tmp_path)
    assert set(policy.lora.targets) == {"q_proj", "k_proj", "v_proj", "down_proj"} and policy.lora.r == 6
    with torch.no_grad():
        full = theirs(ids).logits.log_softmax(-1)[:, :-1]
        expected = full.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        torch.testing.assert_close(policy.score(ids, mask)[:, 1:], expected, atol=1e-4, rtol=1e-4)


def test_adapters_on_a_part_of_a_fused_projection_are_refused():
    with pytest.raises(
        ValueError, match="all of q_proj, k_proj, v_proj or none, .*one qkv_proj; got q_proj, v_proj"
    ):
        tiny_policy(small_config("phi3"), lora=LoraConfig(targets=("q_proj", "v_proj")))


def test_saving_is_exact(tmp_path):
    policy = tiny_policy(lora=LoraConfig(r=4))
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == policy.adapters().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in policy.adapters().items())


def test_bad_adapters(tmp_path):
    policy = tiny_policy(lora=LoraConfig(r=4))
    with pytest.raises(ValueError, match="no adapters to save"):
        tiny_policy().save_adapter(tmp_path)
    with pytest.raises(ValueError, match="no adapter folder: it has no adapter_config.json"):
        policy.load_adapter(tmp_path)
    policy.save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(policy.adapters()))
    with pytest.raises(ValueError, match="somewhere: adapter tensors do not fit this model"):
        policy.load_adapter_tensors({k: v for k, v in tensors.items() if k != name}, source="somewhere")
    save_file({**tensors, name: tensors[name][:, 1:].clone()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(4, 63\), expected \(4, 64\)"):
        policy.load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no adapter_model.safetensors"):
        policy.load_adapter(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, setting):
    policy = tiny_policy(lora=LoraConfig(r=4))
    policy.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(ValueError, match=next(iter(setting))):
        policy.load_adapter(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "LoRA r must be an integer from 1 to 128, got 0"),
        ({"r": "4"}, "LoRA r must be an integer from 1 to 128, got '4'"),
        ({"alpha": None}, "LoRA alpha must be positive and finite, got None"),
        ({"alpha": 0}, "LoRA alpha must be positive and finite, got 0"),
        ({"targets": ("q_proj", "lm_head")}, "got .'lm_head'."),
        ({"targets": ()}, "got none"),
    ],
)
def test_bad_lora_config(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize("text", ["", "[]", '{"r": 4}'])
def test_an_adapter_without_a_configuration_is_named(tmp_path, text):
    policy = tiny_policy(lora=LoraConfig(r=4))
    policy.save_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json is no LoRA configuration"):
        policy.load_adapter(tmp_path)


def test_a_fused_adapter_that_lacks_a_half_is_named(tmp_path):
    policy = tiny_policy(small_config("phi3"), lora=LoraConfig(r=4))
    policy.save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="the adapter of qkv_proj does not fit this model"):
        policy.load_adapter(tmp_path)


def test_target_modules_as_a_pattern_are_refused(tmp_path):
    policy = tiny_policy(lora=LoraConfig(r=4))
    policy.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "all-linear"}))
    with pytest.raises(ValueError, match="target_modules 'all-linear', expected a list"):
        policy.load_adapter(tmp_path)


def test_bad_quantize():
    with pytest.raises(ValueError, match='quantize must be "nf4", "int4" or None, got .int8.'):
        Policy.load(quantize="int8")


def quantised(weights, quantize):
    linear = lambda name: name.rsplit(".", 2)[-2] in LINEARS and name.endswith(".weight")
    device = torch.device("cpu")
    return {
        name: _place(name, tensor, quantize if linear(name) else None, device, torch.float32)
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize("quantize", ["int4", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_4_bit_policy_is_the_dense_policy_of_its_dequantised_weights(quantize, architecture):
    config, lora, (ids, mask) = small_config(architecture), LoraConfig(r=4), group_batch()
    packed = quantised(tiny_weights(config), quantize)
    dense = {
        name: dequantize_4bit(w, torch.float32) if isinstance(w, QuantizedWeight) else w
        for name, w in packed.items()
    }
    assert sum(isinstance(w, QuantizedWeight) for w in packed.values()) == 2 * len(LINEARS)
    four, full = tiny_policy(config, packed, lora=lora), tiny_policy(config, dense, lora=lora)
    scores, grads = score_and_gradients(four, ids, mask)
    expected_scores, expected = score_and_gradients(full, ids, mask)
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm(), name
    plain = tiny_policy(config, tiny_weights(config), lora=lora).score(ids, mask)
    assert (plain - scores).abs().max() > 1e-3, "quantisation changed nothing"


def test_a_weight_that_is_not_finite_is_named():
    weight = torch.full((4, 64), torch.inf)
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight has"):
        _place("model.layers.0.mlp.up_proj.weight", weight, "nf4", torch.device("cpu"), torch.float32)


def test_load_keeps_the_int4_blocks_of_a_gguf_file():
    policy = Policy.load(quantize="int4", lora=LoraConfig(r=1, targets=("q_proj",)))
    source = dict(open_checkpoint(resolve_checkpoint()).tensors(keep_4bit=True))
    kept = 0
    for name, linear in policy.model.projections():
        stored = source[f"{name}.weight"]
        assert isinstance(linear.weight, QuantizedWeight) and linear.weight.format == "int4"
        if isinstance(stored, QuantizedWeight):
            kept += 1
            assert all(torch.equal(stored.tensors()[k], v) for k, v in linear.weight.tensors().items())
    assert kept > 0
    perturb_adapters(policy)
    ids = torch.tensor(policy.tokenizer.encode("The capital of France is Paris"))
    mask = torch.arange(len(ids)) == len(ids) - 1
    with policy.disable_adapters():
        assert policy.score(ids, mask)[-1] > -2.5
