"""GRPOConfig: every bad setting is one clear error; the file it writes; the learning rate."""

import dataclasses
import math

import pytest
from nanogrpo.grpo import PRESETS, GRPOConfig
from nanogrpo.grpo.algorithms import ALGORITHMS
from nanogrpo.grpo.config import KV_DTYPES
from nanogrpo.rollout.sampler import KV_DTYPES as SAMPLER_KV_DTYPES

BAD = [
    ({"lr": 0}, "lr must be greater than 0, got 0"),
    ({"lr": -1e-4}, "lr must be greater than 0"),
    ({"lr": math.nan}, "lr must be greater than 0, got nan"),
    ({"temperature": 0}, "temperature must be greater than 0"),
    ({"lora_alpha": 0}, "lora_alpha must be greater than 0"),
    ({"max_grad_norm": 0}, "max_grad_norm must be greater than 0"),
    ({"group_size": 1}, "group_size must be at least 2, got 1: .* compares"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"prompts_per_step": 0}, "prompts_per_step must be at least 1"),
    ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
    ({"num_iterations": 0}, "num_iterations must be at least 1"),
    ({"lora_r": 0}, "lora_r must be at least 1"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"min_lr_ratio": -0.1}, "min_lr_ratio must be from 0 to 1"),
    ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
    ({"kl_coef": math.nan}, "kl_coef must be at least 0, got nan"),
    ({"token_budget": 0}, "token_budget must be at least 1"),
    ({"held_out": 0}, "held_out must be at least 1"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"task": "smalest"}, "unknown task 'smalest'; nearest is 'smallest'"),
    ({"algorithm": "dr_grop"}, "got 'dr_grop', nearest is 'dr_grpo'"),
    ({"rewards": "formt:1"}, "unknown reward 'formt'; nearest is 'format'"),
    ({"rewards": ""}, "unknown reward ''"),
    ({"estimator": "gea"}, "estimator of grpo must be one of gdpo, grpo, .*, got 'gea'"),
    ({"algorithm": "ppo", "estimator": "rloo"}, "estimator of ppo must be one of gae, got 'rloo'"),
    ({"kl_place": "loos"}, "kl_place must be one of loss, reward, got 'loos'"),
    ({"truncated": "kept"}, "truncated must be one of keep, mask, drop, got 'kept'"),
    ({"dynamic_sampling": 0}, "dynamic_sampling must be at least 1"),
    ({"overlong_buffer": 9}, "overlong_buffer must be at most max_completion_length = 8, got 9"),
    ({"gae_lambda": 1.5}, "gae_lambda must be from 0 to 1, got 1.5"),
    ({"sampler_correction": "token"}, "sampler_correction: got 'token', nearest is 'token-"),
    ({"reward_timeout": 0.0}, "reward_timeout must be greater than 0"),
    ({"dpo_beta": 0.0}, "dpo_beta must be greater than 0"),
    (
        {"algorithm": "online_dpo", "estimator": "rloo"},
        "estimator of online_dpo must be one of grpo, got 'rloo'",
    ),
    ({"algorithm": "online_dpo", "sampler_correction": "token-mask"}, "online_dpo has none"),
    ({"lr": math.inf}, "lr must be finite, got inf"),
    ({"group_size": 2.5}, "group_size must be an integer, got 2.5"),
    ({"seed": 2**31}, "seed must be below 2147483648"),
    ({"quantize": "int8"}, "quantize must be nf4 or int4, got 'int8'"),
    ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, got 'float64'"),
    ({"device": "gpu"}, "device must be cpu or cuda, got 'gpu'"),
    ({"kv_memory": 0.0}, "kv_memory must be a positive number of GiB, got 0.0"),
    ({"kv_dtype": "fp8"}, "kv_dtype must be int8 or left out, got 'fp8'"),
    ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit, adamw_offload, got 'sgd'"),
    (
        {"offload_checkpoints": True, "checkpoint_layers": False},
        "offload_checkpoints needs checkpoint_layers, got false",
    ),
    ({"save_every": 0}, "save_every must be at least 1"),
    ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ({"reward_processes": -1}, "reward_processes must be at least 0"),
    ({"vram_limit": 0.0}, "vram_limit must be a positive number of GiB, got 0.0"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=[str(bad) for bad, _ in BAD])
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        GRPOConfig(**bad)
    assert "\n" not in str(caught.value)


def test_every_field_has_a_default_and_help():
    GRPOConfig()
    for field in dataclasses.fields(GRPOConfig):
        assert field.metadata["help"], field.name


@pytest.mark.parametrize("name", PRESETS)
def test_loss_config_takes_the_settings(name):
    loss = GRPOConfig(algorithm=name, kl_coef=0.3, max_completion_length=9).loss_config()
    assert (loss.name, loss.kl_coef, loss.max_completion_length) == (name, 0.3, 9)
    assert loss.aggregate == PRESETS[name].aggregate
    assert loss.clip_high == PRESETS[name].clip_high


def test_learning_rate_warms_up_and_decays_to_its_floor():
    config = GRPOConfig(steps=20, warmup_steps=4, lr=1.0, min_lr_ratio=0.1)
    rates = [config.learning_rate(step) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    # 16 steps of decay, the first at the peak: the last is one sixteenth of the way above the floor.
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 16)


def test_all_warm_up():
    config = GRPOConfig(steps=2, warmup_steps=5, lr=1.0)
    assert 0 < config.learning_rate(1) < config.learning_rate(2) < 1


def test_file_round_trip(tmp_path):
    config = GRPOConfig(task="add", lr=1.25e-4, share_prefix=False, quantize="nf4", vram_limit=2.5)
    config.save(tmp_path / "config.json")
    assert GRPOConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"step": 3}', '"x"'])
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is no run configuration"):
        GRPOConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_defaults_of_an_algorithm_are_those_of_its_paper(name):
    config, loss = GRPOConfig(algorithm=name), ALGORITHMS[name].loss
    assert (config.estimator, config.kl_place) == (loss.estimator, loss.kl_place)
    assert config.loss_config() == dataclasses.replace(loss, kl_coef=0.1, max_completion_length=8)


def test_the_kl_can_be_moved():
    moved = GRPOConfig(kl_place="reward").loss_config()
    assert (moved.kl_place, moved.kl_estimator, moved.kl_gradient) == ("reward", "k1", "plain")
    moved = GRPOConfig(algorithm="rloo", kl_place="loss").loss_config()
    assert (moved.kl_place, moved.kl_estimator, moved.kl_gradient) == ("loss", "k3", "corrected")


def test_the_caches_dtypes_are_the_samplers():
    assert KV_DTYPES == tuple(SAMPLER_KV_DTYPES)
