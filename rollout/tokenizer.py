"""Text to token ids and back, and chat templates, from a GGUF vocabulary or a Hugging Face folder.

The byte-level BPE itself (Sennrich et al. 2016, arXiv:1508.07909) is the ``tokenizers`` library's; this file
gives it the vocabulary, the merges and the pre-tokenizer that the model was trained with.
"""

import json
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from .config import required, token_ids

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4
GGUF_END_KEYS = ("eos", "eot", "eom")


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    ``eos_token_ids`` are all ids that end a completion; ``pad_token_id`` falls back on the first of them.
    ``special_tokens`` maps names such as ``"bos_token"`` to their text, as chat templates expect them.
    """

    def __init__(self, backend, *, special_tokens=None, eos_token_ids=(), chat_template=None):
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = token_ids([i for i in (eos, *eos_token_ids) if i is not None])
        pad = self._special_id("pad_token")
        self.pad_token_id = pad if pad is not None else next(iter(self.eos_token_ids), None)
        self._template = None if chat_template is None else _compile_template(chat_template)

    @classmethod
    def from_gguf(cls, metadata):
        """Build byte-level BPE from the ``tokenizer.*`` keys of GGUF ``metadata``."""
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if model != "gpt2":
            raise ValueError(
                f"GGUF tokenizer model {model!r} is not supported, expected 'gpt2' (byte-level BPE)"
            )
        if pre not in PRE_TOKENIZERS:
            raise ValueError(
                f"GGUF pre-tokenizer {pre!r} is not supported, expected one of {', '.join(PRE_TOKENIZERS)}"
            )
        tokens, kinds, merges = (
            required(metadata, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
        )
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Llama 3's vocabulary has words that its merges cannot reach.
        backend = Backend(
            models.BPE(
                vocab=vocabulary,
                merges=[tuple(m.split(" ")) for m in merges],
                ignore_merges=pre == "llama-bpe",
            )
        )
        backend.pre_tokenizer = _pre_tokenizer(pre)
        backend.decoder = decoders.ByteLevel()
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        added = {GGUF_CONTROL: True, GGUF_USER_DEFINED: False}
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=added[kind])
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in added
            ]
        )

        def token_id(name):
            return metadata.get(f"tokenizer.ggml.{name}_token_id")

        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {f"{hf}_token": tokens[token_id(k)] for k, hf in names.items() if token_id(k) is not None}
        if metadata.get("tokenizer.ggml.add_bos_token", False):
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, token_id("bos"))]
            )
        ends = [token_id(name) for name in GGUF_END_KEYS]
        template = metadata.get("tokenizer.chat_template")
        return cls(backend, special_tokens=special, eos_token_ids=ends, chat_template=template)

    @classmethod
    def from_folder(cls, path):
        """Read ``tokenizer.json`` with the special tokens and the chat template beside it.

        The template is that of ``chat_template.jinja``, else of ``tokenizer_config.json``. ``eos_token_ids``
        are those of ``tokenizer_config.json``, ``generation_config.json`` and ``config.json`` together.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path} has no tokenizer.json")
        try:
            backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path / 'tokenizer.json'} is no tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        settings = _read_json(path / "tokenizer_config.json")
        special = {name: _token_text(settings[name]) for name in settings if name.endswith("_token")}
        ends = [
            i
            for name in ("generation_config.json", "config.json")
            for i in token_ids(_read_json(path / name).get("eos_token_id"))
        ]
        return cls(
            backend,
            special_tokens={name: text for name, text in special.items() if text is not None},
            eos_token_ids=ends,
            chat_template=_folder_template(path, settings),
        )

    @property
    def vocab_size(self):
        """Number of tokens, added ones included; a model's padded ``config.vocab_size`` may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text, add_special=False):
        """Token ids of ``text``. Special tokens written in the text, such as ``<|im_end|>``, ARE parsed.

        ``add_special=True`` adds what the model's own settings put around a text, for instance a BOS.
        A byte that the vocabulary has no token for is dropped, as in transformers (SmolLM2 lacks six control
        characters and the lead bytes of unassigned planes).
        """
        if not isinstance(text, str):
            raise ValueError(f"expected text as a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is no UTF-8: {text[error.start : error.end]!a} at {error.start}"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids, skip_special_tokens=True):
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch, skip_special_tokens=True):
        """List of the texts of lists of ids, as ``decode`` has them, made by several threads."""
        return self._backend.decode_batch(batch, skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages, add_generation_prompt=True, **variables):
        """Render ``messages`` (dicts with ``role`` and ``content``) by the model's chat template.

        ``variables`` go to the template, for instance ``tools`` or ``enable_thinking``. Raises ``ValueError``
        where there is no template, or where the template refuses the messages.
        """
        if self._template is None:
            raise ValueError("this tokenizer has no chat template: encode plain text instead")
        listed = isinstance(messages, (list, tuple)) and len(messages) > 0
        if not (listed and all(isinstance(m, dict) and "role" in m for m in messages)):
            raise ValueError(
                f"expected messages as a list of dicts with 'role' and 'content', got {messages!r}"
            )
        names = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **names
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def apply_chat_template(self, messages, add_generation_prompt=True, **variables):
        """Token ids of ``chat_text``; special tokens inside a message are parsed like the template's own."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **variables))

    def _special_id(self, name):
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the assistant says; it renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _compile_template(source):
    """Compile a chat template in jinja2's sandbox (it came with a download), with Hugging Face's functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid: {error}") from error


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _pre_tokenizer(name):
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        first, regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        split = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}[name]
        first, regex = pre_tokenizers.Split(Regex(split), behavior="isolated"), False
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


def _folder_template(path, settings):
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_text(value):
    return value["content"] if isinstance(value, dict) else value


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
