"""Do the engine and the trainer hold the same policy? Asked before anything is learned from its samples.

After the first update of a process and at the start of each life, the engine answers a few prompts of the run, and
the trainer computes the log-probs of what it said. Rounding makes them differ by 1e-5 nats a token in fp32 and by a few
hundredths in 16 bits; weights that were taken over wrongly by 0.5 and more.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from prerl_lightning import ranks
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.rollout.sampler import mixed_seed
from prerl_lightning.types import Response, Rollout

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)

PROMPTS, TOKENS = 8, 64  # of each rank, at most
BOUND_FP32, BOUND_16_BITS = 0.01, 0.2  # mean |difference| in nats a token


def mismatch_bound(module: "PolicyModule") -> float:
    """``mismatch_bound``, or what fits the coarser of engine and trainer."""
    if module.measuring.mismatch_bound is not None:
        return module.measuring.mismatch_bound
    return BOUND_16_BITS if any(_rounding(module)) else BOUND_FP32


def _rounding(module: "PolicyModule") -> tuple[bool, bool]:
    """Whether the engine, and whether the trainer, computes with weights in 16 bits."""
    return module.data.engine.weights_dtype != torch.float32, not str(module.trainer.precision).startswith("32")


def rounding(module: "PolicyModule") -> str:
    """Why their log-probs part by more with every update, though both have it; empty: they do not. An update of 1e-5 is
    below what 16 bits resolve in most weights: SmolLM2-135M's, after 7 steps, differed by 0.3 to 0.6 nats a token."""
    by_engine, by_trainer = _rounding(module)
    if module.data.engine.weights_dtype is None or by_engine == by_trainer:
        return ""
    who, other = ("engine", "trainer") if by_engine else ("trainer", "engine")
    return (
        f"The {who} rounds the weights to 16 bits and the {other} does not, which keeps most of an update from it: the "
        "samples are of another policy. Take trainer.precision: bf16-mixed with data.engine.init_args.dtype: bfloat16, "
        "or 32-true with float32."
    )


# within Lightning's validations there may be inference mode, in which FSDP2's first forward would spoil all later ones
@torch.inference_mode(False)
@torch.no_grad()
def check(module: "PolicyModule") -> None:
    """Every rank's own engine, which holds the policy's present weights. Collective.

    Raises:
        InputError: they differ by more than the bound; on all ranks.
    """
    data, strategy = module.data, module.trainer.strategy
    if (parted := rounding(module)) and not module.host.warned_of_mismatch:
        module.host.warned_of_mismatch = True
        log.warning(parted)
    prompts = data.some_prompts(PROMPTS)
    n_tokens = min(TOKENS, *(s.max_new_tokens for s in data.training_samplings))
    sampling = replace(data.sampling, group_size=1, top_p=1.0, top_k=0, max_new_tokens=n_tokens)
    seeds = [mixed_seed(data.run_seed, "check", module.trainer.global_rank, i) for i in range(len(prompts))]
    groups: list[list[Response]] = []
    failure = None
    try:
        groups = data.engine.generate([p.token_ids for p in prompts], sampling, seeds)
    except Exception as error:  # whatever the engine's code for this model stumbles over
        failure = error
    failures = ranks.gather([in_one_line(failure)] if failure else [])
    if failures:  # on one rank or all: none is to wait for another
        raise InputError(f"data.engine: it cannot sample from this model here: {failures[0]}") from failure
    data.engine.forget()  # a resumed run has checked once more than one that went through
    rollout = Rollout.of(
        prompts,
        [group[0] for group in groups],
        group_ids=torch.arange(len(prompts)),
        rewards=torch.zeros(len(prompts), dtype=torch.float64),
        policy_version=module.trainer.global_step,
        temperature=sampling.temperature,
    )
    with strategy.precision_plugin.forward_context():
        passes = module.make_passes(gathered(rollout))
        own = passes.share("post-train", torch.ones(len(passes.lengths), dtype=torch.bool))
        trainer = passes.log_probs("post-train", own)
    apart = (trainer - passes.engine_log_probs).abs().cpu()
    response = torch.arange(len(own)).repeat_interleave(passes.lengths)
    sums = torch.zeros(len(own), dtype=torch.float64).index_add_(
        0, response, torch.where(own[response], apart, 0.0).double()
    )
    sums = ranks.all_reduce(sums)
    of_rank = sums.view(-1, len(prompts)).sum(1) / passes.lengths.view(-1, len(prompts)).sum(1)
    worst, bound = float(of_rank.max()), mismatch_bound(module)
    if worst <= bound:  # not NaN
        return
    rank = f" on rank {int(of_rank.nan_to_num(torch.inf).argmax())}" if len(of_rank) > 1 else ""
    # where the weights were not the folder's, all of them have changed
    suspects = data.engine.suspects if module.trainer.global_step == 0 and not module.trainer.ckpt_path else ()
    named = (
        f" Its update has changed {', '.join(suspects[:4])}{' and more' if len(suspects) > 4 else ''}, although it was "
        "given the weights of its own folder: they are suspected."
        if suspects
        else ""
    )
    raise InputError(
        f"data.engine: the engine samples from another policy than the one that is trained{rank}: their log-probs of "
        f"the same tokens are {worst:.3g} nats apart on average, {bound:g} are allowed.{named} `prerl doctor` with "
        "this configuration looks closer; data.engine.init_args.dtype: float32 tells rounding from error; "
        "model.init_args.mismatch_bound moves the bound."
    )


def warn(module: "PolicyModule", metrics: Mapping[str, float]) -> None:
    """Once a run, of a step whose samples differ by more than the bound."""
    found, bound = metrics.get("mismatch/log_prob_difference", 0.0), mismatch_bound(module)
    if found <= bound or module.host.warned_of_mismatch:
        return
    module.host.warned_of_mismatch = True
    cut = any(s.top_p < 1 or s.top_k > 0 for s in module.data.training_samplings)
    log.warning(
        "Step %d: engine and trainer differ by %.3g nats a token on average (mismatch/log_prob_difference; %g are "
        "expected at most): the loss is that of other samples. %s",
        *(module.trainer.global_step, found, bound),
        "data.sampling.top_p and top_k cut the engine's distribution, not the trainer's: leave them out, or use "
        "model.init_args.importance_sampling."
        if cut
        else "model.init_args.importance_sampling corrects for it; `prerl doctor` shows where it comes from.",
    )
