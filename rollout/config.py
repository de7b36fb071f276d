"""The shape of a Llama, Qwen2, Qwen3 or Phi-3 (Phi-4) decoder, from a ``config.json`` or from GGUF metadata.

Names are Hugging Face's. What this decoder does not compute (other architectures, other RoPE scalings,
sliding windows, biases on the MLP) is refused here, before a weight is read.
"""

from dataclasses import dataclass, field

HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
WINDOWED = ("qwen2", "qwen3")  # a sliding window in the settings counts only where use_sliding_window is set
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know about a checkpoint besides its weights.

    ``attention_bias`` means biases on the q, k and v projections (Qwen2), never on the output projection;
    ``qk_norm`` an RMSNorm over every head's query and key, before they are rotated (Qwen3).
    ``rope_scaling`` is ``None`` or Llama 3's ``{"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}``. ``eos_token_ids`` are all ids that end a
    completion.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    rope_scaling: dict | None = field(default=None, hash=False)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.architecture not in HF_ARCHITECTURES.values():
            raise ValueError(
                f"got architecture {self.architecture!r}, expected {_listed(HF_ARCHITECTURES.values())}"
            )
        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} of a model must be an integer of at least 1, got {size!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_hf(cls, config):
        """Read the dict of a ``config.json``, from transformers 4 or 5; ``ValueError`` if unsupported."""
        architecture = _hf_architecture(config)
        heads, hidden_size = required(config, "num_attention_heads"), required(config, "hidden_size")
        max_positions = config.get("max_position_embeddings", 2048 if architecture == "llama" else 32768)
        rope_theta, rope_scaling = _hf_rope(config)
        _refuse_hf(config, architecture, max_positions)
        return cls(
            architecture=architecture,
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "intermediate_size"),
            num_hidden_layers=required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            rope_theta=rope_theta,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            rope_scaling=rope_scaling,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )

    @classmethod
    def from_gguf_metadata(cls, metadata, *, tie_word_embeddings, rope_scaling=None):
        """Read a GGUF file's key-value pairs.

        GGUF says two things by its tensors only, so the reader passes them: ``tie_word_embeddings`` (there is
        no ``output.weight``) and ``rope_scaling`` (Llama 3's, there is a ``rope_freqs.weight``).
        """
        architecture = metadata.get("general.architecture")
        if architecture not in GGUF_ARCHITECTURES:
            raise ValueError(
                f"GGUF architecture {architecture!r} is not supported, expected one of "
                f"{_listed(GGUF_ARCHITECTURES)}"
            )

        def get(key, default=None):
            return metadata.get(f"{architecture}.{key}", default)

        def need(key):
            return required(metadata, f"{architecture}.{key}")

        if get("expert_count", 0):
            raise ValueError(f"mixture of experts is not supported: {get('expert_count')} experts a layer")
        if get("rope.scaling.type", "none") != "none":
            raise ValueError(f"rope.scaling.type {get('rope.scaling.type')!r} is not supported in GGUF files")
        heads, hidden_size = need("attention.head_count"), need("embedding_length")
        head_dim = get("attention.key_length", hidden_size // heads)
        if get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(
                f"partial rotary embeddings: {get('rope.dimension_count')} of {head_dim} dimensions"
            )
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return cls(
            architecture=architecture,
            vocab_size=len(tokens) or need("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need("feed_forward_length"),
            num_hidden_layers=need("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=float(get("rope.freq_base", 10000.0)),
            rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
            max_position_embeddings=need("context_length"),
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            rope_scaling=rope_scaling,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=token_ids([i for i in ends if i is not None]),
        )


def token_ids(value):
    """``None``, one id or a list of ids, as configuration files write them -> tuple without repetition."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(value if isinstance(value, (list, tuple)) else [value]))


def required(mapping, key):
    """``mapping[key]``; ``ValueError`` where a checkpoint's settings miss it or have null."""
    if mapping.get(key) is None:
        raise ValueError(f"the checkpoint's settings have no {key!r}")
    return mapping[key]


def _hf_architecture(config):
    names = config.get("architectures") or []
    supported = [HF_ARCHITECTURES[name] for name in names if name in HF_ARCHITECTURES]
    if not supported:
        raise ValueError(
            f"config.json: architectures {names} (model_type {config.get('model_type')!r}) is not supported, "
            f"expected one of {_listed(HF_ARCHITECTURES)}"
        )
    return supported[0]


def _hf_rope(config):
    """``(rope_theta, rope_scaling)`` from transformers 4's ``rope_scaling`` or 5's ``rope_parameters``."""
    rope = _rope_settings(config)
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope type {kind!r} is not supported, expected 'default' or 'llama3'")
    return theta, {"rope_type": "llama3", **{key: required(rope, key) for key in LLAMA3_ROPE_KEYS}}


def _rope_settings(config):
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_hf(config, architecture, max_positions):
    """Raise for settings that would change the forward pass in a way that it does not compute."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r}, expected 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if architecture != "qwen2" and config.get(key):
            raise ValueError(f"config.json: {key}=true is not supported for {architecture}")
    rotary = (_rope_settings(config) | config).get("partial_rotary_factor") or 1.0
    if rotary != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {rotary}, expected 1")
    window, sliding = config.get("sliding_window"), "sliding_attention"
    layers = config.get("layer_types")
    if layers is None and architecture in WINDOWED and config.get("use_sliding_window"):
        layers = [sliding] * (config["num_hidden_layers"] - config.get("max_window_layers", 28))
    if layers is None and architecture == "phi3":
        layers = [sliding]
    if sliding in (layers or ()) and window is not None and window < max_positions:
        raise ValueError(
            f"config.json: a sliding window of {window} of {max_positions} tokens, expected none"
        )


def _listed(names):
    return ", ".join(sorted(names))
