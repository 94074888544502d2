"""Measures during training whether the gradients of log p(y) and log p(y given x) point the same way."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from prerl_lightning import ranks
from prerl_lightning.callbacks.watcher import Watcher, append_lines, run_folder
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.metrics.alignment import GROUPS, GradientComparison, Part, ResponseAlignment, comparison_bytes
from prerl_lightning.metrics.evaluation import is_right
from prerl_lightning.metrics.sketch import usable_size
from prerl_lightning.objectives.advantages import group_advantages
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.types import Rollout

log = logging.getLogger(__name__)


class GradientAlignment(Watcher):
    """Cosine and inner product of both gradients on some of a step's responses, right after the step: the first one,
    the last one of each life, and every n.

    Logs, with time/alignment in seconds (each also in time/watchers):

    - alignment/cosine, alignment/inner_product: means over the responses; alignment/negative_share: of the inner
      products; alignment/cosine/positive and /negative, alignment/inner_product/...: by the sign of the advantage
      r - mean;
    - alignment/policy_gradient/...: of sum(advantage * gradient) over these responses;
    - alignment/layers/NAME: mean cosine of a layer group (metrics/alignment.py);
    - with ``bins``, alignment/position/1_of_4 and alignment/probability/0.5_to_0.9: mean cosine of the gradients of the
      tokens of one stretch of the response alone, and of those whose p(y_t given x, y_<t) is in one range;
    - rollout/marginal_log_prob/right and /wrong: mean log p(y) a token, of ``likelihoods`` responses.

    alignment.jsonl in the run's folder has a line for each response. All of it is of the weights after the step, one
    step on from those that sampled; rollout/log_prob is of those. Training is not touched: gradients are measured
    between two steps, where the next one drops them anyway.

    Args:
        every_n_steps: 0: never, at ends neither.
        responses: m, half of them with positive and half with negative advantage where there are such. All ranks
            measure the same ones.
        likelihoods: responses whose log p(y) is computed.
        sketch: buckets of a random projection of each layer group's gradient (error: metrics/sketch.py); 0: exact;
            None: exact up to 268 M weights a rank.
        bins: stretches of a response, e.g. 4, that are compared one by one, and then its tokens by probability; 4 of
            them take about 6 times as long. 0: the response as a whole alone.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        responses: int = 4,
        likelihoods: int = 16,
        sketch: int | None = None,
        bins: int = 0,
    ) -> None:
        given = SimpleNamespace(every_n_steps=every_n_steps, responses=responses, likelihoods=likelihoods, bins=bins)
        check_bounds(given, "alignment", {"every_n_steps": 0, "responses": 1, "likelihoods": 0, "bins": 0})
        if bins == 1:
            raise InputError("alignment.bins: 1 would be the whole response. Give 0, or 2 or more.")
        if sketch and sketch != (size := usable_size(sketch)):
            raise InputError(f"alignment.sketch: {sketch}: give 0, or a prime from 2 to 500,000, e.g. {size}.")
        self.every_n_steps, self.n_responses, self.likelihoods = every_n_steps, responses, likelihoods
        self.sketch, self.bins = sketch, bins
        self.folder: Path | None = None

    def device_bytes(self, parameters: int) -> int:
        """See `objectives.memory.watching`."""
        return comparison_bytes(parameters, self.sketch, self.bins) if self.every_n_steps else 0

    @property
    def prefix_mend(self) -> str:
        """See `PolicyModule.check_prefixes`."""
        return "Or leave the measurement out: alignment.every_n_steps: 0." if self.every_n_steps else ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder = run_folder(trainer)

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        rollout = module.whole_rollout
        if rollout is None or not module.due(self.every_n_steps) or not rollout.lengths.any():
            return {}
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            found = self._alignment(trainer, module, rollout) | self._likelihoods(module, rollout)
        seconds = time.perf_counter() - start
        log.info(
            "gradients of log p(y) and log p(y|x): cosine %.2f, %.0f %% of inner products negative (%.1f s)",
            *(found["alignment/cosine"], 100 * found["alignment/negative_share"], seconds),
        )
        return found | {"time/alignment": seconds}

    def _alignment(self, trainer: L.Trainer, module: PolicyModule, rollout: Rollout) -> dict[str, float]:
        advantages = group_advantages(rollout.signals, rollout.group_ids, "mean")
        numbers = chosen(rollout, advantages.sign(), self.n_responses)
        weights = dict(enumerate(advantages.tolist()))
        comparison = GradientComparison(module.live_policy, self.sketch, module.compute_device)
        each, policy_gradient = comparison.responses(rollout, numbers, weights, module.acting.prefix_id, self.bins)
        if trainer.is_global_zero and self.folder is not None:
            rows = [self._row(trainer, module, rollout, a, weights[a.number], comparison.sketch) for a in each]
            append_lines(self.folder, "alignment.jsonl", rows)
        cosines = [a.products.cosine for a in each]
        inner = [a.products.inner_product for a in each]
        found = {
            "cosine": _mean(cosines),
            "inner_product": _mean(inner),
            "negative_share": _mean([float(x < 0) for x in inner]),
        }
        for name, sign in (("positive", 1), ("negative", -1)):
            some = [a.products for a in each if sign * weights[a.number] > 0]
            if some:
                found[f"cosine/{name}"] = _mean([p.cosine for p in some])
                found[f"inner_product/{name}"] = _mean([p.inner_product for p in some])
        if any(weights[n] for n in numbers):
            found["policy_gradient/cosine"] = policy_gradient.cosine
            found["policy_gradient/inner_product"] = policy_gradient.inner_product
        for group in GROUPS:
            if some_cosines := [a.products.by_group[group] for a in each if group in a.products.by_group]:
                found[f"layers/{group}"] = _mean(some_cosines)
        for kind in ("position", "probability"):
            parts = [getattr(a, f"by_{kind}") for a in each]
            for name in dict.fromkeys(name for some_parts in parts for name in some_parts):
                found[f"{kind}/{name}"] = _mean([p[name].products.cosine for p in parts if name in p])
        return {f"alignment/{k}": v for k, v in found.items()}

    def _row(
        self,
        trainer: L.Trainer,
        module: PolicyModule,
        rollout: Rollout,
        found: ResponseAlignment,
        advantage: float,
        sketch: int,
    ) -> dict[str, Any]:
        products = found.products
        return {
            "step": trainer.global_step,
            "life": module.acting.life,
            "objective": module.acting.title,
            "row": rollout.prompts[int(rollout.group_ids[found.number])].row,
            "reward": float(rollout.rewards[found.number]),
            "advantage": advantage,
            "tokens": int(rollout.lengths[found.number]),
            "cosine": products.cosine,
            "inner_product": products.inner_product,
            "norm_conditional": float(products.aa.sum().sqrt()),
            "norm_marginal": float(products.bb.sum().sqrt()),
            "log_prob": found.log_prob,
            "marginal_log_prob": found.marginal_log_prob,
            "layers": products.by_group,
            "layer_inner_products": dict(zip(GROUPS, products.ab.tolist(), strict=True)),
            "sketch": sketch,
            "position": _rows(found.by_position),
            "probability": _rows(found.by_probability),
        }

    def _likelihoods(self, module: PolicyModule, rollout: Rollout) -> dict[str, float]:
        """Shared over the ranks like any forward pass."""
        if not self.likelihoods:
            return {}
        right = is_right(rollout.rewards)
        some = torch.zeros(len(rollout), dtype=torch.bool)
        some[chosen(rollout, right.long() * 2 - 1, self.likelihoods)] = True
        passes = module.acting.make_passes(rollout, module.acting.prefix_id)
        sums = torch.zeros(2, 2, dtype=torch.float64)  # wrong and right: log-probs, tokens
        own = passes.share("pre-train", some)
        kind, of_own = (x.repeat_interleave(rollout.lengths) for x in (right.long(), own))
        log_probs = passes.log_probs("pre-train", own).cpu().double()[of_own]
        sums.index_add_(0, kind[of_own], torch.stack([log_probs, torch.ones_like(log_probs)], 1))
        sums = ranks.all_reduce(sums)
        names = ("wrong", "right")
        return {f"rollout/marginal_log_prob/{k}": float(s / n) for k, (s, n) in zip(names, sums, strict=True) if n}


def chosen(rollout: Rollout, signs: Tensor, n: int) -> list[int]:
    """Numbers of n responses with tokens, the same on all ranks: half of sign 1 and half of -1 where there are so
    many, filled up with others."""
    generator = torch.Generator().manual_seed(rollout.policy_version)
    drawn = torch.randperm(len(signs), generator=generator)
    drawn = drawn[rollout.lengths[drawn] > 0]
    of_sign = [drawn[signs[drawn] == s] for s in (1, -1)]
    first = torch.cat([of_sign[0][: (n + 1) // 2], of_sign[1][: n // 2]])
    rest = drawn[~torch.isin(drawn, first)]
    return torch.cat([first, rest])[:n].tolist()


def _rows(parts: Mapping[str, Part]) -> dict[str, dict[str, float]]:
    return {
        name: {"tokens": p.tokens, "cosine": p.products.cosine, "inner_product": p.products.inner_product}
        for name, p in parts.items()
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
