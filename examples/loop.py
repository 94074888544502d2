"""DSRL from top to bottom without Lightning, to be read in one sitting: NSR-PreRL on log p(y) for ten optimizer steps,
then GRPO on log p(y|x), one policy, one engine, one optimizer at a time.

    python examples/loop.py

It takes the same steps as `prerl fit --config dsrl.yaml`: the same prompts, seeds, samples and losses, which
tests/test_loop.py compares. What it leaves out is what the package is for: packed passes that compute nothing twice,
a head that never holds tokens x vocabulary, several ranks and GPUs, verifiers in processes with limits, checkpoints,
resuming, what watches a run, several updates a rollout, and errors that say what to do.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prerl_lightning.data.loader import PromptLoader
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.data.tasks.countdown import CountdownProblems
from prerl_lightning.objectives.advantages import Contributing, Normalisation, contributing_responses, group_advantages
from prerl_lightning.policy.model import Policy, load_tokenizer, model_path, prefix_token
from prerl_lightning.policy.packing import Space
from prerl_lightning.rewards.countdown import countdown_reward
from prerl_lightning.rollout.engine import Place, Sampling
from prerl_lightning.rollout.sampler import mixed_seed
from prerl_lightning.rollout.vllm_engine import ENVIRONMENT, VLLMEngine
from prerl_lightning.types import Prompt, Response

MODEL = "embedded"


@dataclass(frozen=True)
class Life:
    """An objective and its optimizer steps."""

    steps: int
    space: Space
    normalisation: Normalisation
    contributing: Contributing
    lr: float = 3e-4


DSRL = (Life(10, "pre-train", "mean", "negative"), Life(40, "post-train", "std", "all"))


def main(
    lives: Sequence[Life] = DSRL,
    prompts_per_step: int = 32,
    group_size: int = 8,
    seed: int = 0,
    max_new_tokens: int = 128,
) -> Iterator[tuple[int, float, float]]:
    """Yields after each optimizer step its number, the mean reward of its rollout and its loss."""
    policy, tokenizer = Policy.from_pretrained(MODEL), load_tokenizer(MODEL)
    prefix = prefix_token(tokenizer, None)  # stands in front of y in log p(y)
    engine = VLLMEngine(max_model_len=144)
    engine.start(model_path(MODEL), seed, Place())
    sampling = Sampling(group_size=group_size, max_new_tokens=128)

    problems = CountdownProblems("train", 4096)
    prompts = PromptFormat().encode([problems[i] for i in range(len(problems))], tokenizer)
    batches = endless(PromptLoader(prompts, prompts_per_step, 0, 1, shuffle_seed=seed))

    step = 0
    for life in lives:
        optimizer = torch.optim.AdamW(policy.parameters(), life.lr, weight_decay=0.0)  # none of the last life's moments
        for _ in range(life.steps):
            engine.update_weights(policy.named_weights(), step)
            batch = next(batches)
            seeds = [mixed_seed(seed, "train", step, i) for i in range(len(batch))]
            groups = engine.generate([prompt.token_ids for prompt in batch], sampling, seeds)
            rewards = torch.tensor([reward(p, r) for p, group in zip(batch, groups, strict=True) for r in group])
            loss = loss_of(life, policy, batch, groups, rewards, prefix)
            if loss is not None:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            yield step, float(rewards.mean()), 0.0 if loss is None else float(loss.detach())
    engine.stop()


def endless(loader: PromptLoader) -> Iterator[list[Prompt]]:
    while True:  # a new order in each epoch
        yield from loader


def reward(prompt: Prompt, response: Response) -> float:
    return countdown_reward(prompt.text, response.text, prompt.ground_truth, prompt.extra)


def loss_of(
    life: Life,
    policy: Policy,
    batch: Sequence[Prompt],
    groups: Sequence[Sequence[Response]],
    rewards: Tensor,
    prefix: int,
) -> Tensor | None:
    """Policy gradient: the mean over all tokens of contributing responses of -advantage * log-prob. None: there are
    none.

    One update a rollout, so the ratio to the weights that sampled is 1 all the way, and no clipping can bite.
    """
    group_ids = torch.arange(len(batch)).repeat_interleave(len(groups[0]))
    advantages = group_advantages(rewards, group_ids, life.normalisation)
    chosen = contributing_responses(advantages, life.contributing).nonzero().flatten().tolist()
    responses = [response for group in groups for response in group]
    total, tokens = torch.zeros(()), 0
    for i in chosen:
        context = (prefix,) if life.space == "pre-train" else batch[int(group_ids[i])].token_ids
        tokens += len(responses[i].token_ids)
        if advantages[i] != 0:  # it is in the denominator, and has no gradient
            log_probs = token_log_probs(policy, context, responses[i].token_ids.tolist())
            total = total - float(advantages[i]) * (log_probs - log_probs.detach()).exp().sum()
    return total / tokens if tokens and total.requires_grad else None


def token_log_probs(policy: Policy, context: Sequence[int], response: Sequence[int]) -> Tensor:
    """(T,) log p of each token of the response behind ``context``: a prompt, or the prefix alone."""
    ids = torch.tensor([[*context, *response]])
    logits = policy.model(ids).logits[0, len(context) - 1 : -1]  # temperature 1
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for number, mean, loss in main(seed=own.seed):
        print(f"step {number}  reward {mean:.2f}  loss {loss:.5f}", flush=True)
