"""k samples of every problem of some sets, verified, and what they come to."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prerl_lightning import ranks
from prerl_lightning.arguments import check_call, check_kinds
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.named import named_sets
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError
from prerl_lightning.evaluation.devices import ranks_on
from prerl_lightning.evaluation.files import ResultFile, records, whole_sets, write_summary
from prerl_lightning.evaluation.measures import measures
from prerl_lightning.evaluation.weights import checkpoint_weights, fingerprint
from prerl_lightning.metrics.evaluation import answer_number
from prerl_lightning.policy.model import model_path
from prerl_lightning.rewards.pool import RewardPool
from prerl_lightning.rewards.score import Reward, sees_tokens
from prerl_lightning.rollout.endpoint import Endpoint
from prerl_lightning.rollout.engine import Engine
from prerl_lightning.rollout.sampler import Way, sample_for_evaluation
from prerl_lightning.secrets import hide_in_text
from prerl_lightning.types import Prompt
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)


def evaluate(
    model: str | Path,
    data: str | Sequence[str] | Mapping[str, ProblemSet] | None = None,
    k: int = 8,
    folder: str | Path | None = None,
    *,
    greedy: bool = True,
    checkpoint: str | Path | None = None,
    endpoint: str | None = None,
    reward: Reward | None = None,
    datamodule: RolloutDataModule | None = None,
    devices: int | None = None,
) -> dict[str, dict[str, float]]:
    """avg@k, pass@k, maj@k and greedy accuracy with 95 % intervals.

    All samples are in FOLDER/SET.jsonl (evaluation/files.py), the returned measures in FOLDER/summary.json, beside
    those of sets that were evaluated into the same folder before, of the same weights. An evaluation that was cut off
    goes on where it stopped, and ends with the same digits, whatever the number of ranks: each has an engine and a
    share of every batch, and all return the measures, which rank 0 has written. The engine is freed at the end.

    Args:
        model: Hugging Face folder or hub id, or ``embedded``; with ``endpoint`` as the server calls it.
        data: names of `data.named.SETS` (NAME, or NAME=FILE), or problem sets by name; None: the held-out sets of
            ``datamodule``.
        k: samples a problem.
        folder: where results go, or are gone on with; None: evaluations/MODEL, of a run's model
            evaluations/NAME-VERSION.
        greedy: one greedy response a problem more.
        checkpoint: a training checkpoint whose weights are taken instead of those in ``model``.
        endpoint: URL of a server that speaks OpenAI's API, asked instead of loading the model.
        reward: a verifier instead of the sets' own.
        datamodule: whose engine, sampling, prompt format, verification and seed are used; its engine must not have
            been started. None: their defaults.
        devices: ranks of this machine, which start the script once each, as Lightning's launcher does; None: those that
            torchrun or srun have started, else one.

    Returns:
        for each set the measures of `evaluation.measures.measures`; the interval of x is x/low and x/high.

    Raises:
        InputError: with the mend, before the engine starts wherever it can be known then.
    """
    check_call(evaluate, locals(), "evaluate")
    model = str(model)
    if k < 1:
        raise InputError(f"--k: {k} is below 1.")
    if endpoint and checkpoint:
        raise InputError("--endpoint: a server has weights of its own: leave the checkpoint out.")
    if endpoint and devices not in (None, 1):
        raise InputError("--endpoint: a server has devices of its own: leave --devices out.")
    place, launch = ranks_on(devices)
    general: Reward | None = None
    sets = dict(data) if isinstance(data, Mapping) else named_sets(data) if data is not None else {}
    if datamodule is None:
        if not sets:
            raise InputError("prerl evaluate: name sets, or give a data module that has some held out.")
        datamodule = RolloutDataModule(train=next(iter(sets.values())))
    elif data is None:
        sets, general = datamodule.held_out, datamodule.val_reward
        if not sets:
            raise InputError("prerl evaluate: the configuration has no data.val; name sets with --data.")
    check_kinds(datamodule, "data")
    engine: Engine = datamodule.engine
    if engine.weights_dtype is not None and not endpoint:
        raise InputError("evaluate: the data module's engine has been started, with weights of its own: give another.")
    seed = datamodule.run_seed
    last = datamodule.train.reward
    rewards = {
        key: reward if reward is not None else datamodule.reward_of(key, problems, general, last)
        for key, problems in sets.items()
    }
    if blind := [key for key in sets if endpoint and sees_tokens(rewards[key])]:
        raise InputError(f"--endpoint: the reward of {blind[0]} sees tokens, and a server sends none. Give another.")
    weights = checkpoint_weights(checkpoint, model) if checkpoint else None
    prompts: Mapping[str, Sequence[Prompt]]
    if endpoint:
        engine = Endpoint(endpoint, model, chat_template_kwargs=datamodule.format.chat_template_kwargs)
        for problems in sets.values():
            problems.load()
        prompts = {k: [datamodule.format_of(set_).untokenised(p) for p in set_] for k, set_ in sets.items()}
    else:
        prompts = datamodule.encode(model, sets)
    folder = Path(folder) if folder else default_folder(model, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    ways = {key: datamodule.held_out_sampling(problems) for key, problems in sets.items()}
    files: dict[str, ResultFile] = {}  # rank 0's
    of_model = {
        "model": model,
        "weights": [endpoint] if endpoint else fingerprint(checkpoint or model_path(model)),
    }
    for key, encoded in prompts.items() if place.rank == 0 else ():
        settings = {
            **of_model,
            "set": key,
            "problems": len(encoded),
            "prompts": answer_number(repr([p.token_ids for p in encoded])),
            "reward": hide_in_text(getattr(rewards[key], "__name__", repr(rewards[key]))),
            "k": k,
            "greedy": greedy,
            "seed": seed,
            "sampling": {name: value for name, value in asdict(ways[key]).items() if name != "group_size"},
        }
        files[key] = ResultFile(folder / f"{key.replace('/', '_')}.jsonl", settings)
    launch()
    done = _of_first([{key: set(file.records) for key, file in files.items()}])
    todo = {key: [p for p in prompts[key] if p.row not in done[key]] for key in prompts}
    try:
        if any(todo.values()):
            engine.start(model_path(model), seed, place)
            if weights is not None:
                engine.update_weights(weights, 1)
        for key, left in todo.items():
            if not left:
                continue
            pool = RewardPool(rewards[key], datamodule.verification)
            try:
                start = time.perf_counter()
                way = Way(ways[key], pool, datamodule.tokenizer)
                for i in range(0, len(left), datamodule.val_batch):
                    watchdog.mark("evaluation", i // datamodule.val_batch + 1)
                    batch = left[i : i + datamodule.val_batch]
                    first, end = (len(batch) * r // place.world_size for r in (place.rank, place.rank + 1))
                    groups = sample_for_evaluation(engine, way, batch[first:end], k, greedy, seed)
                    new = ranks.gather(records(*groups))
                    if key in files:
                        files[key].append(new)
                    there, seconds = len(done[key]) + i + len(batch), time.perf_counter() - start
                    log.info("%s: %d of %d problems, %.0f s", key, there, len(prompts[key]), seconds)
            finally:
                pool.close()
        found = {key: measures(list(file.records.values())) for key, file in files.items()}
        if files:
            others = {key: measures(of_set) for key, of_set in whole_sets(folder, of_model, but=files)}
            write_summary(folder, others | found)
        found = _of_first([found])
    finally:
        engine.stop()
    watchdog.close()
    return found


def _of_first(mine: list[Any]) -> Any:
    """Rank 0's."""
    return ranks.gather(mine)[0]


def default_folder(model: str, checkpoint: str | Path | None = None) -> Path:
    path = Path(model)
    name = path.name or "model"
    if name == "model" and path.is_dir():  # a run's
        name = "-".join(path.resolve().parent.parts[-2:]).replace("/", "") or name
    return Path("evaluations") / (name if checkpoint is None else f"{name}-{Path(checkpoint).stem}")
