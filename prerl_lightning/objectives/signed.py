from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.update import Term


class NSRRL(PolicyModule):
    """Negative sample reinforcement, log p(y given x): `GRPO` on the wrong responses alone."""

    terms = (Term(space="post-train", normalisation="std", contributing="negative"),)


class PSRRL(PolicyModule):
    """Positive sample reinforcement, log p(y given x): `GRPO` on the right responses alone."""

    terms = (Term(space="post-train", normalisation="std", contributing="positive"),)
