"""Token ids and chat templates against transformers, on the packaged vocabulary of SmolLM2."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanogrpo.rollout.checkpoint import resolve_checkpoint
from nanogrpo.rollout.gguf_file import read_gguf
from nanogrpo.rollout.tokenizer import LLAMA3_SPLIT, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

transformers = pytest.importorskip("transformers")

ODD_TEXT = (
    "",
    " ",
    "\n\n\t  \r\n x",
    "The capital of France is Paris.",
    "don't we'll I'VE they're 'tis",
    "naïve café Straße İstanbul ﬁnance e\u0301",
    "你好,世界! こんにちは мир مرحبا नमस्ते",
    "😀👨\u200d👩\u200d👧🏽 🇫🇷 \u202eabc\u202c \ufeff\x00\x7f",
    "def f(x):\n    return x ** 2  # squared\n\n\nclass A: pass\n",
    "12345 3.14159 1,000,000 0x1F 2²=4 ½ ٣ Ⅷ",
    "a  5, \n 7\t\t8 and trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start|>",
    "<|im_star|> <|im_end|><|im_end|>x<repo_name>",
)
CHATS = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?\n"}],
    [
        {"role": r, "content": c}
        for r, c in (("user", " a "), ("assistant", "b<|im_end|>"), ("user", "日本 <b>"))
    ],
)
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'bad' %}{{ raise_exception('no ' + m.role) }}{% endif %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
{% if m.role == 'assistant' %}
    {% generation %}
[{{ m.content | trim }}]
    {% endgeneration %}
{% else %}{{ m | tojson }}{% endif %}{% endfor %}{{ strftime_now('%Y')[:2] }}
{% if tools is not none %}T{{ tools | tojson(indent=2) }}{% endif %}
{% if add_generation_prompt %}>{% endif %}{{ eos_token }}
"""
TEXT = st.text() | st.text("aZ \n\t0123'é½😀,.") | st.lists(st.sampled_from(ODD_TEXT)).map("".join)


@pytest.fixture(scope="module")
def metadata():
    return read_gguf(resolve_checkpoint()).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return Tokenizer.from_gguf(metadata)


@pytest.fixture(scope="module")
def hf():
    path = resolve_checkpoint()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def vocabulary(metadata):
    return {
        "vocab": {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        "merges": [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    }


@pytest.fixture
def folder(tmp_path, hf):
    hf.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def folder_tokenizer(tmp_path_factory, hf):
    folder = tmp_path_factory.mktemp("folder")
    hf.save_pretrained(folder)
    return Tokenizer.from_folder(folder)


def hf_ids(hf, text):
    """transformers' ids under SmolLM2's published pre-tokenizer, which sets every numeral apart first.

    transformers leaves that step out for GGUF files ("a  5" comes out as a, space, space + 5), so each stretch
    between numerals is given to it alone.
    """
    pieces = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            pieces += [character, ""]
        else:
            pieces[-1] += character
    return [i for piece in pieces for i in hf.encode(piece, add_special_tokens=False)]


@pytest.mark.parametrize("text", ODD_TEXT)
def test_odd_text(tokenizer, hf, text):
    ids = tokenizer.encode(text)
    assert ids == hf_ids(hf, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == hf.decode(ids, skip_special_tokens=True)


@given(text=TEXT)
def test_any_text(tokenizer, hf, text):
    ids = tokenizer.encode(text)
    assert ids == hf_ids(hf, text)
    # The vocabulary has no token for these bytes of UTF-8.
    if not set(text.encode()) & {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}:
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(text=TEXT.filter(lambda t: not any(c.isnumeric() for c in t)))
def test_text_without_numerals_is_exactly_transformers(tokenizer, hf, text):
    assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False)


@given(ids=st.lists(st.integers(0, 49151)))
def test_decode_any_ids(tokenizer, hf, ids):
    for skip in (True, False):
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert text == hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode_batch([ids, [], ids[:3]], skip) == [
            text, "", tokenizer.decode(ids[:3], skip_special_tokens=skip)
        ]  # fmt: skip


def test_special_ids(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (2,), 2)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("<|im_end|>") == [2] == tokenizer.encode("<|im_end|>", add_special=True)
    assert tokenizer.decode([1, 6004, 2]) == "hi"


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template(tokenizer, hf, messages, prompt):
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.chat_text(messages, add_generation_prompt=prompt) == text
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == hf_ids(hf, text)


def test_chat_template_of_one_user_turn(tokenizer):
    assert tokenizer.chat_text(CHATS[0]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(contents=st.lists(st.text(), min_size=1, max_size=4))
def test_any_template(hf, contents):
    ours = Tokenizer(hf.backend_tokenizer, special_tokens=hf.special_tokens_map, chat_template=TEMPLATE)
    roles = ("user", "skip", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    tools = [{"name": "<a & b>"}]
    text = hf.apply_chat_template(messages, tools=tools, chat_template=TEMPLATE, tokenize=False)
    assert ours.chat_text(messages, add_generation_prompt=False, tools=tools) == text
    text = hf.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert ours.chat_text(messages) == text


def test_chat_errors(tokenizer, metadata):
    plain = Tokenizer.from_gguf({k: v for k, v in metadata.items() if k != "tokenizer.chat_template"})
    with pytest.raises(ValueError, match="no chat template"):
        plain.apply_chat_template(CHATS[0])
    for bad in ("hi", [], {"role": "user", "content": "hi"}, ["hi"], [{"content": "hi"}]):
        with pytest.raises(ValueError, match="expected messages as a list of dicts"):
            tokenizer.apply_chat_template(bad)
    strict = Tokenizer.from_gguf({**metadata, "tokenizer.chat_template": TEMPLATE})
    with pytest.raises(ValueError, match="refused the messages: no bad"):
        strict.chat_text([{"role": "bad", "content": ""}])
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="refused the messages: .*unsafe"):
        Tokenizer.from_gguf({**metadata, "tokenizer.chat_template": escape}).chat_text(CHATS[0])
    with pytest.raises(ValueError, match="template is not valid"):
        Tokenizer.from_gguf({**metadata, "tokenizer.chat_template": "{% if %}"})


def test_encode_wants_text(tokenizer):
    with pytest.raises(ValueError, match="expected text as a str, got list"):
        tokenizer.encode(["a"])


@pytest.fixture(scope="module")
def families(metadata, vocabulary):
    """transformers' own classes for other pre-tokenizers, given SmolLM2's vocabulary, beside ours."""
    pairs = {}
    for pre, name in (("qwen2", "Qwen2Tokenizer"), ("gpt-2", "GPT2Tokenizer")):
        theirs = getattr(transformers, name)(**vocabulary)
        kinds = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        theirs.add_tokens(
            [transformers.AddedToken(t, normalized=False, special=True) for t, k in kinds if k == 3]
        )
        pairs[pre] = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": pre}), theirs
    return pairs


@given(text=TEXT)
def test_qwen2_and_gpt2_pre_tokenizers(families, text):
    for pre, (ours, theirs) in families.items():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), pre


@pytest.fixture(scope="module")
def llama3(metadata):
    return Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"})


@given(text=st.text() | st.text("aZ \n\t0123'é½😀,."))
def test_llama3_pre_tokenizer(llama3, families, vocabulary, text):
    """Pieces cut by the regex package; a piece that is a token is that token, whatever the merges say."""
    regex = pytest.importorskip("regex")
    _, gpt2 = families["gpt-2"]
    backend, expected = gpt2.backend_tokenizer, []
    for piece in regex.findall(LLAMA3_SPLIT, text):
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[
            0
        ][0]
        token = vocabulary["vocab"].get(spelled)
        expected += [token] if token is not None else [t.id for t in backend.model.tokenize(spelled)]
    assert llama3.encode(text) == expected


def test_llama3_takes_whole_words_that_no_merge_reaches(metadata):
    merges = [m for m in metadata["tokenizer.ggml.merges"] if m != "h ello"]
    changed = {**metadata, "tokenizer.ggml.merges": merges[:300]}
    word = metadata["tokenizer.ggml.tokens"].index("hello")
    assert Tokenizer.from_gguf({**changed, "tokenizer.ggml.pre": "llama-bpe"}).encode("hello") == [word]
    assert Tokenizer.from_gguf({**changed, "tokenizer.ggml.pre": "gpt-2"}).encode("hello") != [word]


def test_gguf_bos_and_user_defined_tokens(metadata):
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    tokens.append("<think> it")
    kinds.append(4)
    changed = {
        **metadata,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 0,
    }
    del changed["tokenizer.ggml.padding_token_id"]
    tokenizer = Tokenizer.from_gguf(changed)
    assert tokenizer.encode("hi") == [6004] and tokenizer.encode("hi", add_special=True) == [1, 6004]
    ids = tokenizer.encode("hi<think> it")
    assert ids == [6004, 49152] and tokenizer.decode(ids) == "hi<think> it"
    assert tokenizer.eos_token_ids == (2, 0) and tokenizer.pad_token_id == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", "tokenizer model 'llama' is not supported, expected 'gpt2'"),
        (
            "pre",
            "tekken",
            "pre-tokenizer 'tekken' is not supported, expected one of gpt-2, llama-bpe, qwen2, smollm",
        ),
        ("pre", None, "pre-tokenizer None is not supported"),
        ("merges", None, "no 'tokenizer.ggml.merges'"),
    ],
)
def test_gguf_errors(metadata, key, value, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf({**metadata, f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize("text", ODD_TEXT)
def test_folder_equals_transformers(folder_tokenizer, hf, text):
    ids = folder_tokenizer.encode(text)
    assert ids == hf.encode(text, add_special_tokens=False)
    assert folder_tokenizer.encode(text, add_special=True) == hf.encode(text)


def test_folder_chat_and_special_ids(folder, hf):
    ours = Tokenizer.from_folder(folder)
    assert (folder / "chat_template.jinja").is_file()
    for messages in CHATS:
        assert ours.apply_chat_template(messages) == hf.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id, ours.vocab_size) == (1, (2,), 2, 49152)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (2, 0, 5)


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [{"name": "rag", "template": "no"}, {"name": "default", "template": t}]]
)
def test_folder_template_of_tokenizer_config(folder, wrap):
    """Older folders hold the template, and special tokens as dicts, in tokenizer_config.json."""
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": wrap("{{ eos_token }}{{ unset }}!"), "pad_token": None}
    settings["eos_token"] = {"content": "<|endoftext|>", "lstrip": False, "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_text(CHATS[0]) == "<|endoftext|>!"
    assert tokenizer.eos_token_ids == (0,) and tokenizer.pad_token_id == 0


def test_folder_truncation_is_switched_off(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("one two three four five six")) == 6


def test_folder_errors(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        Tokenizer.from_folder(folder)
