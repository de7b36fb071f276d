"""The losses of TRL, Liger-Kernel and verl, called with a ``LossConfig`` and our tensors.

Each ``<peer>_loss(config, batch)`` gives the peer's loss as a differentiable scalar, or None where the peer has no
loss of that form. They call the functions and methods that the peers' trainers call, at the versions of
requirements-oracles.txt. Nothing is imported before it is asked for.
"""

import importlib
from collections import defaultdict
from types import SimpleNamespace

import torch

from .loss import sampler_correction


def import_peer(peer, module):
    """A module of a peer; ValueError saying how to install it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"verify against {peer} needs it installed: make test-oracles, or requirements-oracles.txt ({error})"
        ) from error


def _correction(config, batch):
    """p_old / p_sampler as ``config`` bounds it, for peers that take it ready-made; None if not configured."""
    select = lambda name: torch.where(batch["mask"], batch[name], 0.0)
    tokens = SimpleNamespace(old_logprobs=select("old_logprobs"), sampler_logprobs=select("sampler_logprobs"))
    return sampler_correction(tokens, config)


def _trl_name(config):
    """The ``loss_type`` that a clipped, CISPO, SAPO or VESPO loss has in TRL and Liger; None if it has none."""
    if config.surrogate != "clip":
        return config.surrogate if config.surrogate in ("cispo", "sapo", "vespo") else None
    if config.ratio_level not in ("token", "sequence"):
        return None
    if config.name == "bnpo":
        return "bnpo"
    return {
        "seq-mean-token-mean": "grpo",
        "token-mean": "dapo",
        "seq-mean-token-sum-norm": "dr_grpo",
        "seq-mean-token-sum": "luspo",
    }.get(config.aggregate)


def trl_loss(config, batch):
    """TRL's loss, its method called with what it reads of a trainer; None where TRL has no such loss."""
    trainer = import_peer("trl", "trl.trainer.grpo_trainer").GRPOTrainer
    name, mask = _trl_name(config), batch["mask"].double()
    if config.kl_coef and config.kl_estimator != "k3":
        return None
    if config.surrogate == "gmpo" and (config.kl_gradient == "plain" or not config.kl_coef):
        method = import_peer("trl", "trl.experimental.gmpo.gmpo_trainer").GMPOTrainer._compute_loss
    elif config.ratio_level == "sequence-sum":
        method = import_peer("trl", "trl.trainer.rloo_trainer").RLOOTrainer._compute_loss
    elif name is not None:
        method = trainer._compute_loss
    else:
        return None
    correction = _correction(config, batch)
    same = lambda value, *_, **__: value
    k_pos, rate_pos, k_neg, rate_neg = *config.vespo_positive, *config.vespo_negative
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logprobs"], batch["entropy"], None),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, pad_across_processes=same),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            use_bias_correction_kl=config.kl_gradient == "corrected",
            delta=config.dual_clip,
            steps_per_generation=1,
            sapo_temperature_pos=config.sapo_temperatures[0],
            sapo_temperature_neg=config.sapo_temperatures[1],
            vespo_k_pos=k_pos,
            vespo_lambda_pos=rate_pos,
            vespo_k_neg=k_neg,
            vespo_lambda_neg=rate_neg,
        ),
        _metrics={"train": defaultdict(list)},
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
        get_high_entropy_mask=lambda *args: trainer.get_high_entropy_mask(stub, *args),
        loss_type=name,
        importance_sampling_level=config.ratio_level,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        beta=config.kl_coef,
        top_entropy_quantile=config.top_entropy,
        off_policy_mask_threshold=config.off_policy_threshold,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
        max_completion_length=config.max_completion_length,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )
    empty = torch.zeros(len(mask), 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "old_logps": torch.where(batch["mask"], batch["old_logprobs"], 0.0).sum(1),
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": correction,
    }
    if config.off_policy_threshold is not None:
        inputs["sampling_per_token_logps"] = batch["sampler_logprobs"]
    return method(stub, stub.model, inputs)


def liger_loss(config, batch):
    """Liger's loss; None where it has no such loss or refuses the combination."""
    function = import_peer("liger", "liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction
    name, mask = _trl_name(config), batch["mask"].double()
    refused = config.ratio_level == "sequence" and config.surrogate != "clip"
    unknown = config.off_policy_threshold is not None or config.top_entropy < 1
    if name is None or refused or unknown or (config.kl_coef and config.kl_estimator != "k3"):
        return None
    return function.ppo_loss_fn(
        batch["logprobs"],
        mask,
        batch["advantages"],
        mask,
        ref_per_token_logps=batch["ref_logprobs"],
        old_per_token_logps=batch["old_logprobs"],
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        beta=config.kl_coef,
        loss_type=name,
        max_completion_length=config.max_completion_length,
        importance_sampling_level=config.ratio_level,
        delta=config.dual_clip,
        use_bias_correction_kl=config.kl_gradient == "corrected",
        vllm_is_ratio=_correction(config, batch),
        num_items_in_batch=mask.sum(),
    )[0]


def verl_loss(config, batch):
    """verl's loss at its defaults, dual clip included; None where it has no such loss."""
    peer = import_peer("verl", "verl.trainer.ppo.core_algos")
    names = {"clip": "vanilla", "policy-gradient": "gpg", "gmpo": "geo_mean", "dppo-tv": "dppo_tv"}
    names |= {"dppo-kl": "dppo_kl", "cispo": "cispo", "sapo": "sapo"}
    name = names.get(config.surrogate)
    if config.surrogate == "clip" and config.ratio_level != "token":
        name = {"sequence": "gspo", "sequence-token": "gspo"}.get(config.ratio_level)
    elif config.surrogate in ("cispo", "sapo") and config.ratio_level != "token":
        name = None
    filtered = config.off_policy_threshold is not None or config.top_entropy < 1
    if name is None or config.kl_coef or filtered:
        return None
    actor = import_peer("verl", "verl.workers.config").ActorConfig
    bound = config.ratio_max if config.surrogate.startswith("dppo") else config.dual_clip
    settings = actor(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        clip_ratio_low=config.clip_low,
        clip_ratio_high=config.clip_high,
        **({} if bound is None else {"clip_ratio_c": bound}),
    )
    if config.aggregate == "seq-mean-token-sum-norm":
        settings.global_batch_info["loss_scale_factor"] = config.max_completion_length
    mask = batch["mask"].double()
    weights = _correction(config, batch)
    return peer.get_policy_loss_fn(name)(
        batch["old_logprobs"],
        batch["logprobs"],
        batch["advantages"][:, None].expand_as(mask),
        mask,
        loss_agg_mode=config.aggregate,
        config=settings,
        rollout_is_weights=weights,
    )[0]


PEERS = {"trl": trl_loss, "liger": liger_loss, "verl": verl_loss}
