"""``prerl pretrain``: a tiny Llama from scratch on a `Corpus`, in stages.

    prerl pretrain --config configs/pretrain/countdown.yaml --out my_model

makes the embedded model.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

import prerl_lightning.data.tasks.countdown
import prerl_lightning.data.tasks.sums  # noqa: F401  (their corpora by class name)
from prerl_lightning import shipped
from prerl_lightning.data.tasks.corpus import Stage
from prerl_lightning.errors import InputError


def pretrain(args: Sequence[str]) -> None:
    """The command: --out, --seed and --stages, best in a file by --config."""
    parser = ArgumentParser(
        "prerl pretrain", exit_on_error=False, description="A tiny model from scratch on a corpus, in stages."
    )
    parser.add_argument("--config", action="config")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure_every", type=int, default=0, help="steps; 0: at the end of each stage alone")
    parser.add_argument("--problems", type=int, default=128, help="held-out ones to measure with, 8 answers each")
    parser.add_argument("--stages", type=list[Stage], required=True, help="corpus, steps, tokens, lr, warmup of each")
    own = parser.instantiate_classes(parser.parse_args(shipped.in_arguments(args)))
    stages: list[Stage] = own.stages
    if not stages or any(set(stage.corpus.tokens) != set(stages[0].corpus.tokens) for stage in stages):
        raise InputError("prerl pretrain: stages: one at least, and corpora of the same tokens.")
    if own.out.exists() and not own.out.is_dir():
        raise InputError(f"prerl pretrain: --out {own.out} is a file.")
    from prerl_lightning.data.tasks.pretrain import pretrained  # which imports transformers

    pretrained(stages, own.out, own.seed, own.measure_every, own.problems)
