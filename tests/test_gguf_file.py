"""GGUF files: the packaged SmolLM2 against transformers, small written files against what was written."""

import gguf
import numpy as np
import pytest
import torch
from checkpoints import llama_cpp_rows, random_tensors, small_config, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit
from nanogrpo.rollout.checkpoint import resolve_checkpoint
from nanogrpo.rollout.config import ModelConfig
from nanogrpo.rollout.gguf_file import LLAMA3_ROPE, llama3_rope_scaling, read_gguf, rope_row_order


@pytest.fixture(scope="module")
def smollm2():
    return read_gguf(resolve_checkpoint())


@pytest.fixture
def written(tmp_path):
    config = small_config()
    return write_gguf(tmp_path / "small.gguf", config, random_tensors(config))


def test_smollm2_config(smollm2):
    assert smollm2.config == ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_smollm2_tensors_equal_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.path.parent, gguf_file=smollm2.path.name, dtype=torch.float32
    )
    truth, names = model.state_dict(), []
    for name, tensor in smollm2.tensors():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, truth[name]), name
        names.append(name)
    assert set(truth) - set(names) == {"lm_head.weight"}, "the head is tied and has no tensor of its own"
    assert len(names) == 272 and sum(truth[name].numel() for name in names) == 134_515_008


def test_smollm2_4bit_linears_hold_the_dense_values(smollm2):
    packed = 0
    for (name, kept), (_, dense) in zip(smollm2.tensors(keep_4bit=True), smollm2.tensors(), strict=True):
        if isinstance(kept, QuantizedWeight):
            packed += 1
            assert name.endswith("_proj.weight") and kept.shape == tuple(dense.shape)
            kept = dequantize_4bit(kept)
        assert torch.equal(kept, dense), name
    assert packed == 210


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_written_tensors_come_back(tmp_path, architecture, kind):
    config = small_config(architecture)
    tensors = random_tensors(config)
    file = read_gguf(write_gguf(tmp_path / "m.gguf", config, tensors, kind=kind))
    back = dict(file.tensors())
    assert back.keys() == tensors.keys() and file.shapes == {k: tuple(v.shape) for k, v in tensors.items()}
    quant = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            # Blocks run along a row, so reordering rows commutes with quantising them.
            tensor = torch.from_numpy(
                gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), quant), quant)
            )
        assert back[name].dtype == torch.float32 and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"])
def test_super_block_formats(tmp_path, kind):
    """gguf cannot quantise to these, so random bytes stand in; below 60, no half is infinite or NaN."""
    quant = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[quant][1]
    raw = np.random.default_rng(0).integers(0, 60, (8, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=quant)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = read_gguf(tmp_path / "k.gguf")
    file.config = small_config("qwen2")
    ((name, tensor),) = file.tensors()
    assert name == "model.layers.0.mlp.up_proj.weight" and tensor.shape == (8, 512)
    assert tensor.isfinite().all() and tensor.std() > 0
    assert np.array_equal(tensor.numpy(), gguf.quants.dequantize(raw, quant))


def test_only_q4_1_linears_stay_in_4_bits(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    for kind, kept in (("Q4_1", 14), ("Q4_0", 0)):
        file = read_gguf(write_gguf(tmp_path / f"{kind}.gguf", config, tensors, kind=kind))
        found = {n: t for n, t in file.tensors(keep_4bit=True) if isinstance(t, QuantizedWeight)}
        assert len(found) == kept
        dense = dict(file.tensors())
        for name, tensor in found.items():
            assert torch.equal(dequantize_4bit(tensor), dense[name]), name


def test_log_says_once_what_is_dequantised(tmp_path, caplog):
    config = small_config()
    tensors = random_tensors(config)
    matrices = sum(t.ndim == 2 for t in tensors.values())
    linears = sum(n.startswith("model.layers.") and t.ndim == 2 for n, t in tensors.items())

    def said(kind, keep_4bit):
        caplog.clear()
        with caplog.at_level("INFO", logger="nanogrpo"):
            list(
                read_gguf(write_gguf(tmp_path / f"{kind}.gguf", config, tensors, kind=kind)).tensors(
                    keep_4bit
                )
            )
        return [record.getMessage() for record in caplog.records]

    for kind in ("Q4_0", "Q8_0"):
        (message,) = said(kind, True)
        assert (
            f"{kind}.gguf" in message and f"{matrices} of {kind};" in message and "quantised anew" in message
        )
        (message,) = said(kind, False)
        assert message.endswith(f"{matrices} of {kind}")
    (message,) = said("Q4_1", True)  # the embedding and the head
    assert f"{matrices - linears} of Q4_1;" in message
    assert said("F16", True) == []


def test_untied_head_and_biases(tmp_path):
    config = small_config("qwen2", tie_word_embeddings=True)
    tied = read_gguf(write_gguf(tmp_path / "tied.gguf", config, random_tensors(config)))
    assert tied.config.tie_word_embeddings and "lm_head.weight" not in tied.shapes
    config = small_config("qwen2")
    untied = read_gguf(write_gguf(tmp_path / "untied.gguf", config, random_tensors(config)))
    assert not untied.config.tie_word_embeddings and untied.config.attention_bias
    assert untied.shapes["model.layers.1.self_attn.k_proj.bias"] == (32,)


@given(heads=st.integers(1, 9), half=st.integers(1, 40), columns=st.integers(1, 3))
def test_row_order_undoes_llama_cpp(heads, half, columns):
    weight = np.random.default_rng(heads).normal(size=(heads * 2 * half, columns))
    permuted = llama_cpp_rows(weight, 2 * half)
    assert np.array_equal(permuted[rope_row_order(len(weight), 2 * half)], weight)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered(tmp_path, factor):
    """The divisors that llama.cpp stores are the ratio of transformers' plain and scaled frequencies."""
    transformers = pytest.importorskip("transformers")
    settings = {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    hf = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=131072,
        rope_parameters={**settings, "rope_theta": 500000.0},
    )  # fmt: skip
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = (plain / init(hf, "cpu")[0]).numpy().astype(np.float32)
    assert 1 < len(np.unique(factors.round(3))) < 32
    config = small_config(head_dim=64, rope_theta=500000.0, hidden_size=256)
    file = read_gguf(
        write_gguf(tmp_path / "m.gguf", config, random_tensors(config), extra={"rope_freqs.weight": factors})
    )
    assert file.config.rope_scaling == settings
    assert "rope_freqs.weight" not in file.shapes
    assert llama3_rope_scaling(np.ones(32), 500000.0, 64) is None
    with pytest.raises(ValueError, match="does not follow Llama 3's"):
        llama3_rope_scaling(factors[::-1], 500000.0, 64)


@given(data=st.data())
def test_truncation_names_file_and_bytes(tmp_path_factory, data):
    config = small_config()
    folder = tmp_path_factory.mktemp("cut")
    path = write_gguf(folder / "whole.gguf", config, random_tensors(config))
    whole, data_start = path.read_bytes(), gguf.GGUFReader(path).data_offset
    size = data.draw(st.integers(4, len(whole) - 1) | st.integers(4, data_start + 64))
    (folder / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(
        ValueError, match=rf"cut\.gguf is truncated: {size} bytes, expected (at least )?\d+"
    ) as e:
        read_gguf(folder / "cut.gguf")
    expected = int(str(e.value).split()[-1])
    assert size < expected <= len(whole)
    # Once the header is whole, so is the number.
    assert "at least" in str(e.value) if size < data_start - 32 else expected == len(whole)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"])
def test_not_a_gguf(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.gguf is not a GGUF file: it starts with b'.*', expected b'GGUF'"
    ):
        read_gguf(tmp_path / "x.gguf")


def test_unknown_tensor_keeps_its_name(tmp_path):
    config = small_config()
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    file = read_gguf(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), extra=extra))
    assert file.shapes["blk.0.attn_sinks.weight"] == (4,)


def test_config_of_a_written_file(written):
    assert read_gguf(written).config == small_config(rms_norm_eps=float(np.float32(1e-6)))
