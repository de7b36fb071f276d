"""ModelConfig from transformers' own config classes, in the spelling of transformers 4 and 5, and what it refuses."""

import pytest
from checkpoints import small_config
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout.config import ModelConfig

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"]}
GGUF = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128,
    "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 96,
}  # fmt: skip


@given(
    family=st.sampled_from(["Llama", "Qwen2", "Qwen3"]),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 8).map(lambda half: 2 * half),
    tied=st.booleans(),
    rope=st.sampled_from([{"rope_type": "default"}, LLAMA3]),
    theta=st.floats(1e3, 1e7),
    eos=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3, unique=True),
)
def test_transformers_config(family, kv_heads, group, head_dim, tied, rope, theta, eos):
    heads = kv_heads * group
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=heads * head_dim, intermediate_size=24, num_hidden_layers=3, rms_norm_eps=1e-5,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=128,
        tie_word_embeddings=tied, bos_token_id=7, eos_token_id=eos, rope_parameters={**rope, "rope_theta": theta},
    )  # fmt: skip
    ours = ModelConfig.from_hf({**config.to_dict(), "architectures": [f"{family}ForCausalLM"]})
    assert ours == ModelConfig(
        family.lower(), 50, heads * head_dim, 24, 3, heads, kv_heads, head_dim, theta, 1e-5, 128, tied,
        attention_bias=family == "Qwen2", qk_norm=family == "Qwen3",
        rope_scaling=LLAMA3 if rope == LLAMA3 else None, bos_token_id=7,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )  # fmt: skip


def test_phi3_config():
    sizes = {
        "pad_token_id": None,
        "bos_token_id": 7,
        "eos_token_id": [5, 6],
        "rope_parameters": {"rope_theta": 2.5e5},
    }
    config = transformers.Phi3Config(
        **BASE, num_key_value_heads=2, max_position_embeddings=128, **sizes
    ).to_dict()
    config["architectures"] = ["Phi3ForCausalLM"]
    expected = {"rope_theta": 2.5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    ends = {"bos_token_id": 7, "eos_token_ids": (5, 6)}
    assert ModelConfig.from_hf(config) == small_config("phi3", **expected, **ends)
    with pytest.raises(ValueError, match="a sliding window of 64 of 128 tokens"):
        ModelConfig.from_hf({**config, "sliding_window": 64})
    with pytest.raises(ValueError, match="partial_rotary_factor 0.75"):
        ModelConfig.from_hf({**config, "partial_rotary_factor": 0.75})


def test_older_spelling_and_defaults():
    config = ModelConfig.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}})
    assert config == small_config(num_key_value_heads=4, rope_theta=5e5, rope_scaling=LLAMA3)
    assert hash(config) == hash(ModelConfig.from_hf({**BASE, "rope_theta": 5e5}))
    assert ModelConfig.from_hf({**QWEN2, "rope_scaling": None, "head_dim": None}) == small_config(
        "qwen2", num_key_value_heads=4, max_position_embeddings=32768
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            "MambaForCausalLM.*LlamaForCausalLM, Phi3ForCausalLM, Qwen2",
        ),
        ({"architectures": None}, "architectures .* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, expected 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5, expected 1"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
        ),
        ({"head_dim": 15}, "head_dim must be even.* got 15"),
        ({"vocab_size": "big"}, "vocab_size of a model must be an integer of at least 1, got 'big'"),
        ({"vocab_size": 0}, "vocab_size of a model must be an integer of at least 1, got 0"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**BASE, **settings})


def test_sliding_windows():
    """Qwen2 files carry a window that is switched off, or that no layer is deep enough for."""
    window = {"sliding_window": 1024, "max_position_embeddings": 4096}
    unused = ({"use_sliding_window": False}, {"use_sliding_window": True, "max_window_layers": 2})
    for settings in (*unused, {"layer_types": ["full_attention"] * 2}):
        assert ModelConfig.from_hf({**QWEN2, **window, **settings}).attention_bias
    wide = {**QWEN2, **window, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}
    assert ModelConfig.from_hf(wide).max_position_embeddings == 4096
    used = {"use_sliding_window": True, "max_window_layers": 1}
    for settings in (used, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(ValueError, match="sliding window of 1024 of 4096 tokens"):
            ModelConfig.from_hf({**QWEN2, **window, **settings})


def test_gguf_metadata():
    config = ModelConfig.from_gguf_metadata(GGUF, tie_word_embeddings=True)
    assert config == small_config(
        num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=128, tie_word_embeddings=True
    )
    ends = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.eom_token_id": 5,
    }
    more = {**GGUF, **ends, "tokenizer.ggml.tokens": ["a"] * 7, "llama.attention.key_length": 32}
    config = ModelConfig.from_gguf_metadata(more, tie_word_embeddings=False, rope_scaling=LLAMA3)
    assert (config.eos_token_ids, config.vocab_size, config.head_dim) == ((5, 6), 7, 32)
    assert config.rope_scaling == LLAMA3 and not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "GGUF architecture 'mamba' is not supported, expected one of llama, qwen2, qwen3",
        ),
        ({"llama.expert_count": 8}, "mixture of experts is not supported: 8"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 8}, "partial rotary embeddings: 8 of 16"),
        ({"llama.block_count": None}, "no 'llama.block_count'"),
    ],
)
def test_gguf_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf_metadata({**GGUF, **metadata}, tie_word_embeddings=True)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="got architecture 'mamba', expected llama, phi3, qwen2, qwen3"):
        small_config("mamba")
