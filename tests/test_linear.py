"""Stacked projections: their weights, their adapters' storage, and that they are the projections one by one."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from checkpoints import small_config
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit, lora_linear, matmul_4bit, quantize_4bit, swiglu
from nanogrpo.rollout import LoraConfig
from nanogrpo.rollout.linear import LINEARS, STACKS, StackedLinear, concatenate, stack_weights
from nanogrpo.rollout.model import Transformer
from tiny import tiny_policy, tiny_weights

FORMATS = {
    "dense": lambda w: w,
    "nf4": quantize_4bit,
    "nf4, double quant": lambda w: quantize_4bit(w, double_quant=True),
    "int4": lambda w: quantize_4bit(w, "int4"),
}
QKV = STACKS["qkv_proj"]


def draw_parts(sizes, K=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, K, generator=generator) for n in sizes]


def dense(weight):
    return dequantize_4bit(weight, torch.float32) if isinstance(weight, QuantizedWeight) else weight


@pytest.mark.parametrize("quantise", FORMATS.values(), ids=FORMATS)
def test_concatenated_weights_keep_every_value(quantise):
    parts = [quantise(w) for w in draw_parts((48, 300, 16))]
    whole = concatenate(parts)
    assert type(whole) is type(parts[0]) and tuple(whole.shape) == (364, 64)
    assert torch.equal(dense(whole), torch.cat([dense(w) for w in parts]))
    assert concatenate(parts[:1]) is parts[0]


def test_weights_that_do_not_fit_together_are_refused():
    first, second = draw_parts((16, 16))
    for other in (quantize_4bit(second, "int4"), quantize_4bit(second, block_size=32), second):
        with pytest.raises(ValueError, match="share an input are of different kinds"):
            concatenate([quantize_4bit(first), other])
    odd = quantize_4bit(second)
    odd.code_book = odd.code_book.flip(0)
    with pytest.raises(ValueError, match="different code books"):
        concatenate([quantize_4bit(first), odd])


def test_stacking_frees_the_parts_and_passes_the_rest_through():
    parts, alive = dict(zip(QKV, (4, 2, 2), strict=True)), {}

    def source():
        yield "model.norm.weight", torch.ones(3)
        for kind in ("weight", "bias"):
            for name, rows in parts.items():
                tensor = torch.full((rows, 8) if kind == "weight" else (rows,), float(rows))
                alive[f"{kind} {name}"] = weakref.ref(tensor)
                yield f"model.layers.0.self_attn.{name}.{kind}", tensor
                del tensor
        yield "model.layers.0.self_attn.o_proj.weight", torch.ones(8, 4)

    stacked = dict(stack_weights(source()))
    gc.collect()
    assert len(alive) == 6 and all(reference() is None for reference in alive.values())
    assert {name: tuple(tensor.shape) for name, tensor in stacked.items()} == {
        "model.norm.weight": (3,),
        "model.layers.0.self_attn.qkv_proj.weight": (8, 8),
        "model.layers.0.self_attn.qkv_proj.bias": (8,),
        "model.layers.0.self_attn.o_proj.weight": (8, 4),
    }
    assert stacked["model.layers.0.self_attn.qkv_proj.bias"].tolist() == [4.0] * 4 + [2.0] * 4
    again = dict(stack_weights(stacked.items()))
    assert again.keys() == stacked.keys() and all(again[name] is stacked[name] for name in stacked)


@pytest.mark.parametrize("quantise", [FORMATS["dense"], FORMATS["nf4"]])
def test_a_model_shares_its_weights_with_the_dict_it_was_made_of(quantise):
    plain = tiny_weights(small_config("qwen2"))
    linear = lambda name: name.rsplit(".", 2)[-2] in LINEARS and name.endswith("weight")
    weights = {name: quantise(tensor) if linear(name) else tensor for name, tensor in plain.items()}
    expected = {name: dense(weight).clone() for name, weight in weights.items()}
    model = Transformer(small_config("qwen2"), weights)
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        assert torch.equal(dense(weight), expected[name]), name
    codes = lambda weight: weight.codes if isinstance(weight, QuantizedWeight) else weight
    for name, projection in model.projections():
        assert codes(weights[f"{name}.weight"]).data_ptr() == codes(projection.weight).data_ptr()
        own, whole = codes(projection.weight), codes(projection.linear.weight)
        assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_stack_that_lacks_a_part_is_named():
    weights = tiny_weights(small_config())
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate_up_proj.weight has only gate_proj"):
        Transformer(small_config(), weights)


@given(
    st.lists(st.sampled_from(QKV), unique=True),
    st.sampled_from(list(FORMATS)),
    st.sampled_from([1, 7, 70]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_stacked_projections_are_the_projections_one_by_one(targets, format, rows, r, seed):
    sizes = (48, 16, 32)
    weights = [FORMATS[format](w) for w in draw_parts(sizes, seed=seed)]
    generator = torch.Generator().manual_seed(seed)
    biases = [torch.randn(n, generator=generator) for n in sizes]
    linear = StackedLinear(QKV, sizes, concatenate(weights), torch.cat(biases))
    linear.add_adapters(targets, r, 2.5 * r, generator)
    for b in linear.lora_b:
        b.data.normal_(generator=generator)
    x = torch.randn(rows, 64, generator=generator, requires_grad=True)
    dy = torch.randn(rows, sum(sizes), generator=generator)
    apart = []
    for projection, weight, bias in zip(linear.projections(), weights, biases, strict=True):
        assert torch.equal(dense(projection.weight), dense(weight)) and projection.shape == tuple(
            weight.shape
        )
        assert (projection.lora_a is not None) == (projection.name in targets)
        if projection.lora_a is None:
            base = matmul_4bit(x, weight, bias) if format != "dense" else F.linear(x, weight, bias)
            apart.append(base)
        else:
            apart.append(lora_linear(x, weight, projection.lora_a, projection.lora_b, 2.5, bias))
    leaves = [x, *linear.lora_a, *linear.lora_b]
    got, expected = linear(x), torch.cat(apart, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(y, leaves, dy) for y in (got, expected))
    for grad, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)
    linear.adapter_on = False
    plain = [matmul_4bit(x, w) if format != "dense" else F.linear(x, w) for w in weights]
    torch.testing.assert_close(linear(x), torch.cat(plain, 1) + torch.cat(biases), rtol=1e-5, atol=1e-5)


def test_adapters_are_views_of_buffers_that_an_optimiser_updates():
    policy = tiny_policy(lora=LoraConfig(r=4))
    for _, linear in policy.model.linears():
        for parts in (linear.lora_a, linear.lora_b):
            whole, end = parts[0].untyped_storage(), parts[0].data_ptr()
            for part in parts:
                assert part.is_leaf and part.requires_grad and part.data_ptr() == end
                end += part.nbytes
            assert whole.nbytes() == end - whole.data_ptr()
    assert set(policy.adapters().values()) == set(policy.model.parameters())
    linear = policy.model.layers[0].qkv_proj
    x = torch.randn(5, 64)
    before, address = linear(x).detach(), [p.data_ptr() for p in policy.adapters().values()]
    optimizer = torch.optim.AdamW(policy.adapters().values(), lr=0.1, fused=True)
    (linear(x) ** 2).sum().backward()
    grads = [p.grad for p in (*linear.lora_a, *linear.lora_b)]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    optimizer.step()
    assert (linear(x) - before).abs().min() > 0, "the update is not what the layer reads"
    assert address == [p.data_ptr() for p in policy.adapters().values()]


def test_new_adapters_replace_all_others():
    policy = tiny_policy(lora=LoraConfig(r=4))
    policy.add_adapters(LoraConfig(r=2, targets=("v_proj", "down_proj")))
    assert len(list(policy.model.parameters())) == 2 * 2 * 2
    assert [p.name for _, p in policy.model.projections() if p.lora_a is not None] == [
        "v_proj",
        "down_proj",
    ] * 2
    assert [p.name for _, p in policy.model.projections()] == [*LINEARS] * 2


def test_an_adapter_of_the_same_shape_is_loaded_in_place(tmp_path):
    policy, other = (tiny_policy(lora=LoraConfig(r=4, alpha=alpha), seed=alpha) for alpha in (4, 8))
    other.save_adapter(tmp_path)
    address = [p.data_ptr() for p in policy.adapters().values()]
    policy.load_adapter(tmp_path)
    assert address == [p.data_ptr() for p in policy.adapters().values()]
    assert policy.lora.alpha == 8 and all(linear.scaling == 2 for _, linear in policy.model.linears())
    for name, tensor in other.adapters().items():
        assert torch.equal(policy.adapters()[name], tensor)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj"), ()])
def test_what_follows_a_stack(format, targets):
    weights = [FORMATS[format](w) for w in draw_parts((32, 32), seed=0)]
    linear = StackedLinear(("gate_proj", "up_proj"), (32, 32), concatenate(weights))
    linear.add_adapters(targets, 4, 4, torch.Generator().manual_seed(0))
    x, residual = torch.randn(5, 64), torch.randn(5, 64)
    with torch.no_grad():
        for b in linear.lora_b:
            b.normal_()
        y = linear(x)
        assert torch.equal(linear(x, residual=residual), residual + y)
        torch.testing.assert_close(linear(x, gated=True), swiglu(y))
