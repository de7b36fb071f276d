"""From weights on disk (in the page cache) to the first token: a whole process, interpreter and imports included.

A folder of bfloat16 random weights (float32 on the CPU), quantised to NF4 while it is loaded. Beside ours
transformers with bitsandbytes.
"""

import json
import sys
import time

import cases
import pytest
import torch
from comparison import Error, Peer, in_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = list(range(3, 35))
LIMIT = 0.25  # of the first token's log-prob: plainly wrong beyond


def start_ours(folder):
    from nanogrpo.rollout import Policy, Sampler, SamplingParams

    policy = Policy.load(folder, quantize="nf4", lora=None, device=DEVICE)
    yield
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    [[completion]] = Sampler(policy).generate([PROMPT], params)
    yield completion.token_ids[0], completion.logprobs[0]


def start_transformers(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map=DEVICE
    )
    yield
    with torch.no_grad():
        log_p = model(torch.tensor([PROMPT], device=DEVICE)).logits[0, -1].float().log_softmax(-1)
    token = log_p.argmax().item()
    yield token, log_p[token].item()


STARTS = {"ours": start_ours, "transformers": start_transformers}


def main(name, folder):
    """Load, answer, and print the token, its log-prob and the seconds of both parts."""
    began, parts = time.perf_counter(), STARTS[name](folder)
    next(parts)
    loaded = time.perf_counter()
    token, logprob = next(parts)
    seconds = {"load": loaded - began, "first token": time.perf_counter() - loaded}
    print(json.dumps({"token": token, "logprob": logprob, "seconds": seconds}))


PEERS = [
    Peer("ours", None, lambda: "ours", rounds=2),
    Peer("transformers + bitsandbytes", "bitsandbytes", lambda: "transformers", rounds=1),
]


@pytest.mark.parametrize("model", cases.cold_start(DEVICE))
def test_cold_start(compare, model, tmp_path):
    pytest.importorskip("transformers", reason="writes the folder")
    import peer_models
    from nanogrpo.rollout.random_weights import random_policy
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    dense = random_policy(model, None, None, device=DEVICE)
    model_of_theirs = peer_models.causal_lm(dense)
    model_of_theirs.save_pretrained(tmp_path)
    Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(tmp_path / "tokenizer.json"))
    bytes_on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    shape = {"parameters": sum(weight.numel() for weight in model_of_theirs.parameters())}
    del dense, model_of_theirs
    policy, seconds = random_policy(model, "nf4", None, device=DEVICE), {}

    def verify(result):
        token = result["token"]
        ids = torch.tensor([*PROMPT, token])
        with torch.no_grad():
            truth = policy.score(ids, torch.arange(len(ids)) == len(PROMPT))[-1].item()
        return {"log-prob error": Error(abs(result["logprob"] - truth), LIMIT)}

    def call(name):
        def lap():
            [result] = in_process(__file__, name, tmp_path)
            seconds.setdefault(name, {k: 1e3 * v for k, v in result["seconds"].items()})
            return result

        return [lap]

    case = cases.Case(f"{model} from disk, nf4", "bfloat16" if DEVICE == "cuda" else "float32", shape)
    compare(
        case, "process to first token", peers=PEERS, call=call, verify=verify, flops=0, nbytes=bytes_on_disk,
        facts=lambda contenders: {"ms after the imports": seconds["ours"]}, rounds={"warmup": 0, "fewest": 2},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
