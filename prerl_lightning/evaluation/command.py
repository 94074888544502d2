"""``prerl evaluate`` and ``prerl compare``: the command line over `evaluate` and `compare`.

prerl evaluate --model Qwen/Qwen2.5-0.5B-Instruct --data math500,aime24 --k 32
prerl evaluate --config runs/dsrl/version_0/config.yaml --ckpt_path runs/dsrl/version_0/checkpoints/last.ckpt
prerl evaluate --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B --data aime24 --k 8
torchrun --nproc-per-node 8 --no-python prerl evaluate --model Qwen/Qwen2.5-0.5B-Instruct --data math500 --k 32
prerl compare evaluations/a evaluations/b
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prerl_lightning import refusals
from prerl_lightning.data.named import SETS, named_sets
from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.evaluation.files import common_sets
from prerl_lightning.signals import first_rank

if TYPE_CHECKING:
    from prerl_lightning.evaluation.comparison import Comparison


def evaluate(args: Sequence[str]) -> dict[str, dict[str, float]]:
    """Prints and returns the measures of each set.

    Raises:
        InputError: with the mend, before the engine starts wherever it can be known then.
    """
    own, rest = evaluate_arguments().parse_known_args(args)
    if own.endpoint and (not own.model or own.ckpt_path):
        raise InputError("--endpoint: give --model as the server calls it, and no --ckpt_path.")
    named = [name for given in own.data for name in given.split(",")]
    sets = named_sets(named, own.limit, own.style) if named else None
    rest = refusals.checked(rest, vars(own))
    if not refusals.config_files(rest):
        if not own.model or not named:
            raise InputError("prerl evaluate: give --model and --data, or the --config of a run.")
        name = named[0].partition("=")[0]
        made = ["--model=GRPO", "--data.engine=VLLMEngine", "--data.train=NamedProblems"]
        rest = [*made, f"--data.train.init_args.name={name}", *rest]
    if own.endpoint:
        rest.append("--trainer.precision=32-true")  # its default is by the model's configuration, which is not here
    if own.reward:
        rest.append(f"--data.val_reward={own.reward}")
    if own.model:
        rest.append(f"--model.init_args.model={own.model}")
    from prerl_lightning.evaluation import sampling  # heavy, as all that it needs
    from prerl_lightning.run import RunParts

    cli = RunParts.run(["fit", *rest, "--trainer.logger=false"])
    data = cli.datamodule
    model = str(cli.model.model_name)
    folder = own.out or sampling.default_folder(model, own.ckpt_path)
    found = sampling.evaluate(
        model,
        sets,
        own.k,
        folder,
        greedy=own.greedy,
        checkpoint=own.ckpt_path,
        endpoint=own.endpoint,
        reward=data.val_reward if own.reward else None,  # a configuration's own is for its own problems
        datamodule=data,
        devices=own.devices,
    )
    if first_rank():
        print(_table(found))
        print(f"Samples and summary.json are in {folder}")
    return found


def evaluate_arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "prerl evaluate",
        description="avg@k, pass@k, maj@k and greedy accuracy with 95 % intervals, from k samples a problem.",
        epilog="Further options are those of prerl fit, e.g. --config FILE, --data.sampling.max_new_tokens 2048, "
        "--data.engine.init_args.max_model_len 4096, --data.format.chat_template_kwargs '{enable_thinking: false}'.",
    )
    parser.add_argument("--model", help="Hugging Face folder or hub id, or embedded; default: the configuration's")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a server that speaks OpenAI's API, e.g. vllm serve: http://localhost:8000/v1; --model as it is there",
    )
    parser.add_argument("--ckpt_path", help="a training checkpoint whose weights to take; needs its run's --config")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SET[=FILE],...",
        help=f"of {', '.join(SETS)}, each from the hub or a FILE; repeatable; default: the configuration's held-out "
        "sets",
    )
    parser.add_argument("--limit", type=int, help="use the first so many problems of each named set")
    parser.add_argument("--style", choices=("chat", "plain"), default="chat", help="plain: for base models")
    parser.add_argument("--reward", metavar="PATH", help="a verifier instead of the sets' own")
    parser.add_argument("--k", type=int, default=8, help="samples a problem (default 8)")
    parser.add_argument("--no_greedy", dest="greedy", action="store_false", help="leave out the one greedy response")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="share the problems between N GPUs, or N processes on a CPU, an engine each: the same samples, sooner; "
        "default: 1, or the ranks that torchrun or srun have started",
    )
    parser.add_argument("--out", help="folder; default: evaluations/MODEL, of a run's model evaluations/NAME-VERSION")
    return parser


def _table(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for key, values in found.items():
        lines.append(f"{key}:")
        of = f"of {values['problems']:.0f} problem{'s' if values['problems'] != 1 else ''}"
        for name, value in values.items():
            if f"{name}/low" in values:
                ends = f"[{values[f'{name}/low']:.3f}, {values[f'{name}/high']:.3f}]"
                lines.append(f"  {name:10} {value:.3f}  {ends}  {of}")
        rest = ("length", "truncated", "no_answer", "timeouts", "errors")
        lines.append("  " + ", ".join(f"{n} {values[n]:.3g}" for n in rest if n in values))
        if partial := values["partial"]:
            lines.append(
                f"  {partial:.2g} of the samples have a reward that is neither 0 nor 1: avg, maj and greedy count it "
                "as it is, pass as wrong"
            )
    return "\n".join(lines)


def compare(args: Sequence[str]) -> "dict[str, Comparison]":
    """Prints and returns the differences, b - a."""
    parser = ArgumentParser("prerl compare", description="Differences of two evaluations, b - a.")
    parser.add_argument("a", help="folder of prerl evaluate")
    parser.add_argument("b")
    own = parser.parse_args(args)
    common_sets(own.a, own.b)  # refused at once
    from prerl_lightning.evaluation import comparison

    found = comparison.compare(own.a, own.b)
    for key, one in found.items():
        print(f"{key}: {one.problems} problems in both ({one.of_a} and {one.of_b})")
        for name, d in one.measures.items():
            small = d["smallest"]
            shows = f"shows {small:.3f} and more" if math.isfinite(small) else "too few problems to show any difference"
            p = f"p = {d['p']:.3f}" if d["p"] >= 0.001 else "p < 0.001"
            print(
                f"  {name:10} {d['a']:.3f} -> {d['b']:.3f}  {d['difference']:+.3f} "
                f"[{d['low']:+.3f}, {d['high']:+.3f}]  {p}  {shows}"
            )
    print(
        "p: two-sided, by flipping signs. What a set shows: a difference with p < 0.05 in four of five comparisons.",
        "Where p and the interval part, believe the interval: it reckons with what few problems do not show.",
        sep="\n",
    )
    return found
