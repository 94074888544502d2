"""What a rollout alone tells about the policy: no forward pass is needed for any of it."""

import numpy as np
import torch
from torch import Tensor

from prerl_lightning.metrics.evaluation import is_right, pass_at_k
from prerl_lightning.types import Rollout

NGRAM = 4  # tokens


def rollout_statistics(rollout: Rollout) -> dict[str, float]:
    """Of the rollout of all ranks (`objectives.passes.gathered`), the same on all of them. Right is a reward of 1 or
    more; what there is nothing of is left out.

    - rollout/entropy: of the policy in nats a token, estimated by the mean of -log p of the sampled tokens;
    - rollout/log_prob: mean log p(y given x) a token, as the engine gave it;
    - rollout/repetition: share of 4-grams that stood in the same response before;
    - rollout/no_answer: share of responses without an answer, of a verifier that tells what it read;
    - rollout/pass@k: unbiased, from each prompt's responses;
    - reward/NAME/mean: of each reward of a sum, over the responses that have it;
    - source/NAME/...: of each set of a mixture;
    - refill/...: of what refilling gave up, where it is on.
    """
    lengths, rewards, n = rollout.lengths, rollout.rewards, len(rollout)
    tokens = int(lengths.sum())
    found = {
        "reward/mean": float(rewards.mean()),
        "reward/timeouts": float(rollout.timeouts),
        "reward/errors": float(rollout.errors),
        "rollout/responses": float(n),
        "rollout/tokens": float(tokens),
        "rollout/response_length": float(lengths.double().mean()),
        "rollout/truncated": float(rollout.truncated.double().mean()),
    }
    if rollout.answered:
        found["rollout/no_answer"] = 1 - rollout.answered / n
    up_to = torch.nn.functional.pad(rollout.log_probs.double().cumsum(0), (1, 0))
    log_probs = up_to[lengths.cumsum(0)] - up_to[lengths.cumsum(0) - lengths]  # (N,), summed over tokens
    if tokens:
        found["rollout/entropy"] = -float(log_probs.sum()) / tokens
        found["rollout/repetition"] = repetition(rollout.tokens, lengths)
    right = is_right(rewards)
    for name, those in (("right", right), ("wrong", ~right)):
        if those.any():
            found[f"rollout/response_length/{name}"] = float(lengths[those].double().mean())
            if lengths[those].sum():
                found[f"rollout/log_prob/{name}"] = float(log_probs[those].sum() / lengths[those].sum())
    for name, scores in rollout.parts.items():
        found[f"reward/{name}/mean"] = float(scores.nanmean())
    return found | _groups(rollout) | _sources(rollout) | _refill(rollout)


def _sources(rollout: Rollout) -> dict[str, float]:
    sources = [prompt.source for prompt in rollout.prompts]
    found: dict[str, float] = {}
    right, sizes = _counts(rollout)
    for source in sorted({*sources} - {""}):
        groups = [i for i, name in enumerate(sources) if name == source]
        those = torch.isin(rollout.group_ids, torch.tensor(groups))
        mixed = sum(0 < right[i] < sizes[i] for i in groups)
        found |= {
            f"source/{source}/prompts": float(len(groups)),
            f"source/{source}/reward": float(rollout.rewards[those].mean()),
            f"source/{source}/groups_mixed": mixed / len(groups),
            f"source/{source}/response_length": float(rollout.lengths[those].double().mean()),
            f"source/{source}/truncated": float(rollout.truncated[those].double().mean()),
        }
    return found


def _refill(rollout: Rollout) -> dict[str, float]:
    done = rollout.refill
    if done is None:
        return {}
    found = {"refill/rounds": float(done.rounds), "refill/groups": float(done.groups)}
    found |= {"refill/tokens": float(done.tokens), "time/refill": done.seconds}
    if done.groups:
        found["refill/reward"] = done.rewards / (done.groups * len(rollout) / len(rollout.prompts))
    return found


def _groups(rollout: Rollout) -> dict[str, float]:
    """Shares of prompts with mixed, all right and all wrong responses, and pass@k."""
    n_prompts = len(rollout.prompts)
    right, sizes = _counts(rollout)
    all_right = sum(r == s for r, s in zip(right, sizes, strict=True)) / n_prompts
    all_wrong = right.count(0) / n_prompts
    found = {
        "rollout/groups_mixed": 1 - all_right - all_wrong,
        "rollout/groups_all_right": all_right,
        "rollout/groups_all_wrong": all_wrong,
    }
    most = min(sizes)
    for k in sorted({*(1 << e for e in range(most.bit_length())), most} - {0}):
        found[f"rollout/pass@{k}"] = sum(pass_at_k(s, c, k) for s, c in zip(sizes, right, strict=True)) / n_prompts
    return found


def _counts(rollout: Rollout) -> tuple[list[int], list[int]]:
    """Of each prompt its right responses, and all of them."""
    of_all = (rollout.group_ids[is_right(rollout.rewards)], rollout.group_ids)
    right, sizes = (group_ids.bincount(minlength=len(rollout.prompts)).tolist() for group_ids in of_all)
    return right, sizes


def repetition(tokens: Tensor, lengths: Tensor) -> float:
    """Share of `NGRAM`-grams that stood earlier in their own response; 0 where all are shorter.

    Args:
        tokens: (T,) of all responses, one behind the other.
        lengths: (N,) tokens of each.
    """
    if not len(tokens):
        return 0.0
    keys, later = torch.arange(len(lengths)).repeat_interleave(lengths), tokens.long()
    for offset in range(NGRAM):  # a 64-bit hash, which wraps around
        keys.mul_(6364136223846793005).add_(1442695040888963407)
        keys[: max(0, len(keys) - offset)] += later[offset:]
    whole = torch.ones(len(keys), dtype=torch.bool)  # but for those that begin at the last tokens of a response
    for offset in range(1, NGRAM):
        last = lengths.cumsum(0) - offset
        whole[last[last >= 0]] = False
    ordered = np.sort(keys[whole].numpy())  # several times faster than torch's and than unique
    return float((ordered[1:] == ordered[:-1]).sum()) / len(ordered) if len(ordered) else 0.0
