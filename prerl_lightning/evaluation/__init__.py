"""``prerl evaluate`` and ``prerl compare``, from Python too:

    from prerl_lightning.evaluation import compare, evaluate
    evaluate("Qwen/Qwen2.5-0.5B-Instruct", ["math500", "aime24"], k=32)
    compare("evaluations/A", "evaluations/B")["math500"].measures["avg@32"]["difference"]

``sampling`` draws and verifies, ``weights`` says which weights are evaluated, ``files`` is the format of SET.jsonl,
``measures`` makes numbers of its lines (by metrics/evaluation.py), ``comparison`` the differences of two folders;
``command`` is the command line over them. Nothing is imported before a name is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
