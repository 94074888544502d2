"""``prerl evaluate``.

    prerl evaluate --model Qwen/Qwen2.5-0.5B-Instruct --data math500,aime24 --k 32
    prerl evaluate --config runs/dsrl/version_0/config.yaml --ckpt_path runs/dsrl/version_0/checkpoints/last.ckpt
    prerl evaluate --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B --data aime24 --k 8

Every problem's k samples become a line of OUT/SET.jsonl as soon as its batch is verified, behind a first line with the
settings. A killed evaluation goes on behind the last whole line; since a sample's seed depends on its problem alone, it
ends as if it had never stopped.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.data.module import RolloutDataModule, first_reward
from prerl_lightning.data.named import SETS, NamedProblems
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.errors import ArgumentParser, InputError
from prerl_lightning.metrics.evaluation import answer_number, summary
from prerl_lightning.policy.model import as_on_disk, empty_model, model_path
from prerl_lightning.resume import load
from prerl_lightning.rewards.pool import RewardPool
from prerl_lightning.rollout.endpoint import Endpoint
from prerl_lightning.rollout.engine import Engine, Place
from prerl_lightning.rollout.sampler import Group, sample_for_evaluation
from prerl_lightning.run import PrerlCLI
from prerl_lightning.secrets import hide_in_text
from prerl_lightning.types import Prompt

log = logging.getLogger(__name__)

Record = dict[str, Any]  # a line: row, prompt, ground_truth, samples, greedy


class _Configured(PrerlCLI):
    """The configuration of a run, its parts made and nothing started."""

    def instantiate_trainer(self, **_: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "prerl evaluate",
        description="avg@k, pass@k, maj@k and greedy accuracy with 95 %% intervals, from k samples a problem.",
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
        metavar="SET[=FILE],...",
        help=f"of {', '.join(SETS)}, each from the hub or a FILE; default: the configuration's held-out sets",
    )
    parser.add_argument("--limit", type=int, help="use the first so many problems of each named set")
    parser.add_argument("--style", choices=("chat", "plain"), default="chat", help="plain: for base models")
    parser.add_argument("--reward", metavar="PATH", help="a verifier instead of the sets' own")
    parser.add_argument("--k", type=int, default=8, help="samples a problem (default 8)")
    parser.add_argument("--no_greedy", dest="greedy", action="store_false", help="leave out the one greedy response")
    parser.add_argument("--out", help="folder; default: evaluations/MODEL")
    return parser


def evaluate(args: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run the command; prints and returns the measures of each set.

    Raises:
        InputError: with the mend, before the engine starts wherever it can be known then.
    """
    own, rest = _arguments().parse_known_args(args)
    if own.k < 1:
        raise InputError(f"--k: {own.k} is below 1.")
    if own.endpoint and (not own.model or own.ckpt_path):
        raise InputError("--endpoint: give --model as the server calls it, and no --ckpt_path.")
    configured = any(a == "--config" or a.startswith("--config=") for a in rest)
    if not configured:
        if not own.model or not own.data:
            raise InputError("prerl evaluate: give --model and --data, or the --config of a run.")
        name = own.data.split(",")[0].partition("=")[0]
        made = ["--model=GRPO", "--data.engine=VLLMEngine", "--data.train=NamedProblems"]
        rest = [*made, f"--data.train.init_args.name={name}", *rest]
    if own.endpoint:
        rest.append("--trainer.precision=32-true")  # its default is by the model's configuration, which is not here
    if own.reward:
        rest.append(f"--data.val_reward={own.reward}")
    if own.model:
        rest.append(f"--model.init_args.model={own.model}")
    cli = _Configured.run(["fit", *rest, "--trainer.logger=false"])
    data: RolloutDataModule = cli.datamodule
    model = str(cli.model.model_name)
    sets = _problem_sets(own, data)
    sampling = data.val_sampling.over(data.sampling)
    seed = data.seed if data.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
    # with --data alone, the configuration's reward is for its own problems
    given = data.val_reward if own.reward or not own.data else None
    rewards = {key: first_reward(key, given, problems.reward, data.train.reward) for key, problems in sets.items()}
    weights = _checkpoint_weights(own.ckpt_path, model) if own.ckpt_path else None
    engine: Engine = data.engine
    prompts: Mapping[str, Sequence[Prompt]]
    if own.endpoint:
        engine = Endpoint(own.endpoint, model, chat_template_kwargs=data.format.chat_template_kwargs)
        prompts = {key: _untokenised(problems, data.format) for key, problems in sets.items()}
    else:
        prompts = data.encode(model, sets)
    folder = Path(own.out or Path("evaluations") / _name(model, own.ckpt_path))
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for key, encoded in prompts.items():
        settings = {
            "model": model,
            "weights": [own.endpoint] if own.endpoint else _fingerprint(own.ckpt_path or model_path(model)),
            "set": key,
            "problems": len(encoded),
            "prompts": answer_number(repr([p.token_ids for p in encoded])),
            "reward": hide_in_text(getattr(rewards[key], "__name__", repr(rewards[key]))),
            "k": own.k,
            "greedy": own.greedy,
            "seed": seed,
            "sampling": {k: v for k, v in asdict(sampling).items() if k != "group_size"},
        }
        files[key] = _ResultFile(folder / f"{key.replace('/', '_')}.jsonl", settings)
    todo = {key: [p for p in prompts[key] if p.row not in file.records] for key, file in files.items()}
    if any(todo.values()):
        engine.start(model_path(model), seed, Place())
        if weights is not None:
            engine.update_weights(weights, 1)
    for key, left in todo.items():
        if left:
            pool = RewardPool(rewards[key], data.verification)
            try:
                start = time.perf_counter()
                for i in range(0, len(left), data.val_batch):
                    batch = left[i : i + data.val_batch]
                    groups, greedy = sample_for_evaluation(engine, pool, batch, sampling, own.k, own.greedy, seed)
                    files[key].append(groups, greedy)
                    done, seconds = len(files[key].records), time.perf_counter() - start
                    log.info("%s: %d of %d problems, %.0f s", key, done, len(prompts[key]), seconds)
            finally:
                pool.close()
    found = {key: measures(list(file.records.values())) for key, file in files.items()}
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    print(_table(found))
    print(f"Samples and summary.json are in {folder}")
    return found


def _problem_sets(own: argparse.Namespace, data: RolloutDataModule) -> dict[str, ProblemSet]:
    if own.data is None:
        if data.val is None:
            raise InputError("prerl evaluate: the configuration has no data.val; name sets with --data.")
        return data.held_out
    found: dict[str, ProblemSet] = {}
    for item in own.data.split(","):
        name, _, path = item.partition("=")
        found[name] = NamedProblems(name, path or None, limit=own.limit, style=own.style)
    return found


def _untokenised(problems: ProblemSet, prompt_format: PromptFormat) -> list[Prompt]:
    problems.load()
    return [prompt_format.untokenised(problem) for problem in problems]


def _name(model: str, checkpoint: str | None) -> str:
    name = model.rstrip("/").rpartition("/")[2] or "model"
    return name if checkpoint is None else f"{name}-{Path(checkpoint).stem}"


def _checkpoint_weights(path: str, model: str) -> Iterator[tuple[str, Tensor]]:
    """Of a training checkpoint, by their names in the folder of ``model``, tied ones once."""
    if not Path(path).is_file():
        raise InputError(f"--ckpt_path: {path}: no such file.")
    state = load(path).get("state_dict", {})
    prefix = "policy.model."
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not found:
        raise InputError(f"--ckpt_path: {path} holds no weights of a policy: it is not one of ours.")
    once = {(t.data_ptr(), t.shape): name for name, t in reversed(found.items())}
    names = set(once.values())
    return as_on_disk(empty_model(model), ((name, tensor) for name, tensor in found.items() if name in names))


def _fingerprint(path: str) -> list[Any]:
    """Sizes and times of the weight files; a hub id stands for itself."""
    source = Path(path).expanduser()
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) if source.is_dir() else []
    return [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files] or [path]


def _record(samples: Group, greedy: Group | None) -> Record:
    def answers(group: Group) -> list[dict[str, Any]]:
        return [
            {
                "text": response.text,
                "score": verdict.score,
                "answer": verdict.answer,
                "failure": verdict.failure,
                "tokens": len(response.token_ids),
                "truncated": response.truncated,
            }
            for response, verdict in zip(group.responses, group.verdicts, strict=True)
        ]

    return {
        "row": samples.prompt.row,
        "prompt": samples.prompt.text,
        "ground_truth": samples.prompt.ground_truth,
        "samples": answers(samples),
        "greedy": answers(greedy)[0] if greedy is not None else None,
    }


class _ResultFile:
    """OUT/SET.jsonl: settings, then a line a problem.

    Raises:
        InputError: the file is there and was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[int, Record] = {}
        if path.is_file() and path.stat().st_size:
            found, records, whole = read_results(path)
            changed = [k for k in settings if found.get(k) != settings[k]]
            differing = [f"{k}: {found.get(k)} there, {settings[k]} here" for k in changed]
            if differing:
                raise InputError(
                    f"{path} is of an evaluation with other settings ({'; '.join(differing)[:600]}). Give another "
                    "--out, or delete it."
                )
            self.records = {r["row"]: r for r in records}
            os.truncate(path, whole)  # a kill may have left half a line
            log.info("%s: going on behind %d problems", path.name, len(records))
        else:
            self._write([{"settings": settings}])

    def append(self, groups: Sequence[Group], greedy: Sequence[Group]) -> None:
        greedy_of = {group.prompt.row: group for group in greedy}
        records = [_record(group, greedy_of.get(group.prompt.row)) for group in groups]
        self._write(records)
        self.records |= {r["row"]: r for r in records}

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("ab") as file:
            # one write, so that what a full disk or a kill leaves is a beginning of it
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def read_results(path: Path) -> tuple[dict[str, Any], list[Record], int]:
    """Settings, records, and the bytes that whole lines take."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        first, *records = map(json.loads, lines)
        return first["settings"], records, sum(map(len, lines))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of prerl evaluate ({error!r}).") from None


def _matrix(records: Sequence[Record], value: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[value(s) for s in r["samples"]] for r in records], dtype=dtype)


def scores(records: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    """(P, k) rewards and answers, and (P,) or (0,) greedy rewards."""
    greedy = [r["greedy"]["score"] for r in records if r["greedy"] is not None]
    return (
        _matrix(records, lambda s: s["score"], torch.float64),
        _matrix(records, lambda s: answer_number(s["answer"]), torch.long),
        torch.tensor(greedy, dtype=torch.float64),
    )


def measures(records: Sequence[Record]) -> dict[str, float]:
    """As `metrics.evaluation.summary`, and shares of failed verifications."""
    records = sorted(records, key=lambda r: r["row"])
    rewards, answers, greedy = scores(records)
    lengths = _matrix(records, lambda s: s["tokens"], torch.long)
    truncated = _matrix(records, lambda s: s["truncated"], torch.long)
    found = summary(rewards, answers, lengths, truncated, greedy)
    for failure in ("timeout", "error"):
        found[f"{failure}s"] = float(sum(s["failure"] == failure for r in records for s in r["samples"]))
    return found


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
    return "\n".join(lines)
