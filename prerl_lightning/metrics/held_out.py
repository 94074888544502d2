"""The metric of a validation. Apart from its measures (evaluation.py), which need nothing that is slow to import."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prerl_lightning.metrics.evaluation import answer_number, summary
from prerl_lightning.ranks import gather_state
from prerl_lightning.rollout.sampler import Group


class EvaluationMetric(Metric):
    """Of a set of problems, k samples each, and perhaps one greedy response. Its states are on the CPU."""

    full_state_update = False
    higher_is_better = True
    rows: list[Tensor]
    rewards: list[Tensor]
    answers: list[Tensor]
    lengths: list[Tensor]
    truncated: list[Tensor]
    greedy_rows: list[Tensor]
    greedy: list[Tensor]

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_state)
        for name in ("rows", "rewards", "answers", "lengths", "truncated", "greedy_rows", "greedy"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, samples: Sequence[Group], greedy: Sequence[Group], k: int) -> None:
        """Every rank has to, even without a problem: an empty state takes no part in gathering."""
        verdicts = [v for group in samples for v in group.verdicts]
        responses = [r for group in samples for r in group.responses]
        kinds = [answer_number(v.answer) for v in verdicts]
        self.rows.append(torch.tensor([g.prompt.row for g in samples], dtype=torch.long))
        self.rewards.append(torch.tensor([v.score for v in verdicts], dtype=torch.float64).view(-1, k))
        self.answers.append(torch.tensor(kinds, dtype=torch.long).view(-1, k))
        self.lengths.append(torch.tensor([len(r.token_ids) for r in responses], dtype=torch.long).view(-1, k))
        self.truncated.append(torch.tensor([r.truncated for r in responses], dtype=torch.long).view(-1, k))
        self.greedy_rows.append(torch.tensor([g.prompt.row for g in greedy], dtype=torch.long))
        self.greedy.append(torch.tensor([g.verdicts[0].score for g in greedy], dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        """Nothing where there was no problem. The interval of x is x/low and x/high."""
        rows = dim_zero_cat(self.rows)
        if not len(rows):
            return {}
        order = rows.argsort()
        rewards, answers, lengths, truncated = (
            dim_zero_cat(s)[order] for s in (self.rewards, self.answers, self.lengths, self.truncated)
        )
        greedy = dim_zero_cat(self.greedy)[dim_zero_cat(self.greedy_rows).argsort()]
        return summary(rewards, answers, lengths, truncated, greedy)
