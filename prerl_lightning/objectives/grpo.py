from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.update import Term


class GRPO(PolicyModule):
    """Standard RL: log p(y given x), advantages over the group's std, all responses contribute (arXiv 2402.03300)."""

    terms = (Term(space="post-train", normalisation="std", contributing="all"),)
