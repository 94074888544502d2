from .held_out import EvaluationMetric as EvaluationMetric
from .intervals import difference as difference
from .intervals import interval as interval
from .rollout import rollout_statistics as rollout_statistics
from .seal import SealLabels as SealLabels
from .thoughts import ThoughtCounts as ThoughtCounts
from .thoughts import ThoughtFinder as ThoughtFinder
from .utilisation import TrainingFlops as TrainingFlops
