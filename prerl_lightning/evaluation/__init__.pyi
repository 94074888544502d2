from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .files import read_results as read_results
from .sampling import evaluate as evaluate
