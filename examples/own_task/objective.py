"""An objective: which log-prob, which advantage, which responses contribute."""

from prerl_lightning import PolicyModule, Term


class DrGRPO(PolicyModule):
    """GRPO without the division by the standard deviation of a group's rewards."""

    terms = (Term(space="post-train", normalisation="mean", contributing="all"),)
