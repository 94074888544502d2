"""``prerl evaluate`` and ``prerl compare``, from Python too:

    from prerl_lightning.evaluation import compare, evaluate
    evaluate("Qwen/Qwen2.5-0.5B-Instruct", ["math500", "aime24"], k=32)
    compare("evaluations/A", "evaluations/B")["math500"].measures["avg@32"]["difference"]

``sampling`` draws and verifies, ``weights`` says which weights are evaluated, ``files`` is the format of SET.jsonl,
``measures`` makes numbers of its lines (by metrics/evaluation.py), ``comparison`` the differences of two folders;
``command`` is the command line over them. Nothing is imported before a name is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prerl_lightning.evaluation.comparison import Comparison, compare
    from prerl_lightning.evaluation.files import read_results
    from prerl_lightning.evaluation.sampling import evaluate

__all__ = ["Comparison", "compare", "evaluate", "read_results"]

_HOMES = {"Comparison": "comparison", "compare": "comparison", "evaluate": "sampling", "read_results": "files"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
