from prerl_lightning.objectives.advantages import GroupMean
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term


class PreRL(PolicyModule):
    """Pre-train space: log p(y), advantages r - mean, all responses contribute (arXiv 2604.14142)."""

    terms = (Term(space="pre-train", advantage=GroupMean(), contributing="all"),)


class NSRPreRL(PolicyModule):
    """Negative sample reinforcement in pre-train space: `PreRL` on the wrong responses of mixed groups alone."""

    terms = (Term(space="pre-train", advantage=GroupMean(), contributing="negative"),)


class PSRPreRL(PolicyModule):
    """Positive sample reinforcement in pre-train space: `PreRL` on the right responses of mixed groups alone."""

    terms = (Term(space="pre-train", advantage=GroupMean(), contributing="positive"),)
