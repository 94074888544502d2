from prerl_lightning.objectives.advantages import GroupStd
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term


class NSRRL(PolicyModule):
    """Negative sample reinforcement, log p(y given x): `GRPO` on the wrong responses alone."""

    terms = (Term(space="post-train", advantage=GroupStd(), contributing="negative"),)


class PSRRL(PolicyModule):
    """Positive sample reinforcement, log p(y given x): `GRPO` on the right responses alone."""

    terms = (Term(space="post-train", advantage=GroupStd(), contributing="positive"),)
