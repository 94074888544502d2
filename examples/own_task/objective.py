"""An objective: which log-prob, which advantage, how token losses become one ..."""

from prerl_lightning import PolicyModule, Term
from prerl_lightning.objectives.advantages import GroupMean
from prerl_lightning.objectives.aggregations import ConstantLength


class DrGRPO(PolicyModule):
    """GRPO without its two divisions, by the standard deviation of a group's rewards and by a response's length, in the
    place of which stands the longest that there can be (arXiv 2503.20783)."""

    terms = (Term(space="post-train", advantage=GroupMean(), aggregation=ConstantLength(tokens=64)),)
