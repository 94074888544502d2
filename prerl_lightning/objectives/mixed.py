from typing import Any

from prerl_lightning.errors import check_bounds
from prerl_lightning.objectives.advantages import Contributing, GroupMean, GroupStd
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term


class MixedRL(PolicyModule):
    """GRPO's loss + ``pretrain_coefficient`` * a pre-train-space loss, on one rollout. A KL penalty is GRPO's alone.

    Args:
        pretrain_coefficient: c; 0.01 in the paper's code.
        pretrain_contributing: ``negative``: NSR-PreRL's loss, ``positive``: PSR-PreRL's, ``all``: PreRL's.
        kwargs: as for every objective.
    """

    def __init__(
        self, pretrain_coefficient: float = 0.01, pretrain_contributing: Contributing = "negative", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.pretrain_coefficient = pretrain_coefficient
        check_bounds(self, type(self).__name__, {"pretrain_coefficient": 0})
        self.terms = (
            Term(space="post-train", advantage=GroupStd(), contributing="all"),
            Term("pre-train", GroupMean(), pretrain_contributing, coefficient=pretrain_coefficient),
        )
