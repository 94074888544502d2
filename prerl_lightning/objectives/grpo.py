from prerl_lightning.objectives.advantages import GroupStd
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term


class GRPO(PolicyModule):
    """Standard RL: log p(y given x), advantages over the group's std, all responses contribute (arXiv 2402.03300)."""

    terms = (Term(space="post-train", advantage=GroupStd(), contributing="all"),)
