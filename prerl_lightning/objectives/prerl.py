from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.update import Term


class PreRL(PolicyModule):
    """Pre-train space: log p(y), advantages r - mean, all responses contribute (arXiv 2604.14142)."""

    terms = (Term(space="pre-train", normalisation="mean", contributing="all"),)


class NSRPreRL(PolicyModule):
    """Negative sample reinforcement in pre-train space: `PreRL` on the wrong responses of mixed groups alone."""

    terms = (Term(space="pre-train", normalisation="mean", contributing="negative"),)


class PSRPreRL(PolicyModule):
    """Positive sample reinforcement in pre-train space: `PreRL` on the right responses of mixed groups alone."""

    terms = (Term(space="pre-train", normalisation="mean", contributing="positive"),)
