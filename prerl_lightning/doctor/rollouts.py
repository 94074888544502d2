"""Checks of the engine beside the policy, and of a whole run with both: a tiny model on the first GPU or the CPU."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.countdown import CountdownProblems
from prerl_lightning.doctor.passes import random_ids, waited
from prerl_lightning.doctor.subject import GIB, Result, Subject, result
from prerl_lightning.objectives import GRPO
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import Family, micro_batches
from prerl_lightning.rewards import LengthPenalty
from prerl_lightning.rollout.engine import Place, Sampling
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.training import default_precision
from prerl_lightning.types import Response, Sequences

KV_MIB = 256
SAMPLING = Sampling(group_size=4, max_new_tokens=32)
MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.06}  # mean |difference| of log-probs, in nats
STALE = 0.2  # what wrong weights differ by, at least: here it is 0.9


def engine(subject: Subject) -> Result:
    """It starts, draws by seed, takes new weights over, agrees with the trainer; on a GPU it hands its memory back."""
    device = subject.device
    # on a GPU vLLM wants its share to be free whatever its cache takes
    made = VLLMEngine(max_model_len=128, kv_cache_mib=KV_MIB, gpu_memory_utilization=0.1, max_num_seqs=64)
    _, start_s = waited(device, lambda: made.start(subject.tiny, 0, Place(device=device)))
    subject.engine = made
    tokens, longest, _ = made.room()
    assert made.weights_dtype is not None
    bound = MISMATCH[made.weights_dtype]
    policy = subject.policy(subject.tiny)
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.model.config.vocab_size
    prompts = [random_ids(generator, 12, vocabulary) for _ in range(8)]
    seeds = list(range(100, 108))
    drawn = [made.generate(prompts, SAMPLING, seeds) for _ in range(2)]
    pairs = list(zip(*map(_ids, drawn), strict=True))
    same = sum(a == b for a, b in pairs)
    apart = [mismatch(policy, prompts, drawn[0], bound)]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(device))
    stale = mismatch(policy, prompts, drawn[0], bound)

    def updated(version: int) -> float:
        made.update_weights(policy.named_weights(made.weights_dtype), version)
        return mismatch(policy, prompts, made.generate(prompts, SAMPLING, seeds), bound)

    apart.append(updated(1))
    figures: dict[str, Any] = {"start_s": start_s, "kv_tokens": tokens, "sequences": tokens / longest, "stale": stale}
    figures |= {
        "dtype": str(made.weights_dtype).removeprefix("torch."),
        "same_responses": same,
        "responses": len(pairs),
    }
    text = (
        "starts in {start_s:.1f} s in {dtype}; room for {kv_tokens:,} tokens, {sequences:.0f} sequences of full length"
    )
    mends = []
    if subject.on_gpu:
        before = torch.cuda.mem_get_info(device)[0]
        made.sleep()
        figures["freed_gib"] = (torch.cuda.mem_get_info(device)[0] - before) / GIB
        apart.append(updated(2))
        text += "; asleep it frees {freed_gib:.2f} GiB"
        if figures["freed_gib"] < 0.8 * KV_MIB / 1024:
            mends.append("data.engine.init_args.sleep_between_rollouts: false, and a smaller gpu_memory_utilization.")
    if same < (len(pairs) / 2 if subject.on_gpu else len(pairs)):  # a GPU's kernels may round another way the next time
        mends.append(
            "Seeds do not hold, so that runs do not repeat themselves; on a GPU VLLM_BATCH_INVARIANT=1 may help."
        )
    if not (all(x < bound for x in apart) and stale > STALE):  # NaN neither
        mends.append(
            "Engine and trainer disagree: training would be off-policy. Other releases of vLLM, torch and transformers "
            "than `versions` above asks for? Else report it; data.engine.init_args.dtype: float32 narrows it down."
        )
    agreement = (
        f"the same seeds give {same} of {len(pairs)} responses again; mean |log-prob difference| to the trainer "
        f"{apart[0]:.2g}, with new weights {', '.join(f'{x:.2g}' for x in apart[1:])} (allowed {bound:g}; "
        f"not taken over they would be {stale:.2g} off)"
    )
    return result(text, mends, [agreement], **figures, differences=apart, bound=bound)


def _ids(groups: Sequence[Sequence[Response]]) -> list[list[int]]:
    return [response.token_ids.tolist() for group in groups for response in group]


@torch.no_grad()
def mismatch(
    policy: Policy, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Response]], bound: float
) -> float:
    """Mean |trainer - engine| of the tokens' log-probs; in 16 bits, where the engine is."""
    responses = [response for group in groups for response in group]
    sequences, contexts = Sequences.of([r.token_ids for r in responses]), Sequences.of(prompts)
    engine = torch.cat([torch.from_numpy(r.log_probs) for r in responses])
    made = [Family(contexts[i // SAMPLING.group_size], (i,), (len(r.token_ids),)) for i, r in enumerate(responses)]
    device = policy.device
    total = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=bound > MISMATCH[torch.float32], cache_enabled=False):
        kernel = policy.attention_kernel(device)
        for batch in micro_batches(made, sequences, 2048, packed=policy.can_pack, kernel=kernel):
            log_probs, _ = policy(batch.to(device))
            total += float((log_probs.cpu() - engine[batch.source]).abs().sum())
    return total / len(engine)


# ---------------------------------------------------------------------- a run

STAGES = ("rollout", "reward", "forward_backward", "optimizer", "update_weights")


def step(subject: Subject) -> Result:
    """A run as `prerl fit` makes it, on one device: validation, two steps, validation and a checkpoint; resumed from
    there for a third, and a last validation."""
    first, second = subject.folder / "first", subject.folder / "resumed"
    _fit(subject, first, 2)
    checkpoint = first / "checkpoints" / "last.ckpt"
    _fit(subject, second, 3, checkpoint)
    rows = [*_rows(first), *_rows(second)]
    validated = [int(row["step"]) for row in rows if row.get("val/avg@2")]
    steps = {int(row["step"]): row for row in rows if row.get("time/step")}
    last = {name: float(value) for name, value in steps[2].items() if value}
    seconds = {name: last.get(f"time/{name}", 0.0) for name in STAGES}
    moved = [float(row["optim/grad_norm"]) for row in steps.values() if row.get("optim/grad_norm")]
    apart = [float(row["mismatch/log_prob_difference"]) for row in steps.values()]
    bound = MISMATCH[subject.engine.weights_dtype]
    mfu = last.get("train/mfu")
    mends = [] if validated == [0, 2, 3] else [f"Validations at {validated}: please report it."]
    if list(steps) != [1, 2, 3] or len(moved) < 3 or not all(0 < norm < float("inf") for norm in moved):
        mends.append(f"Steps {list(steps)} with gradient norms {moved}: please report it, with PRERL_DEBUG=1.")
    if not all(x < bound for x in apart):
        mends.append("Engine and trainer disagree after a step: see `engine` above; please report it.")
    spent = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return result(
        "2 steps, and a third resumed from {checkpoint_mib:.1f} MiB; tokens/s: rollout {rollout_tokens_s:.0f}, "
        "training {training_tokens_s:.0f}" + (", MFU {mfu:.1%}" if mfu is not None else ""),
        mends,
        [f"step 2, seconds: {spent}; mismatch/log_prob_difference {max(apart):.2g} (allowed {bound:g})"],
        checkpoint_mib=checkpoint.stat().st_size / 2**20,
        seconds=seconds,
        rollout_tokens_s=last["rollout/tokens_per_second"],
        training_tokens_s=last["train/tokens_per_second"],
        mfu=mfu,
        mismatch=max(apart),
        bound=bound,
    )


def _fit(subject: Subject, folder: Path, steps: int, checkpoint: Path | None = None) -> None:
    data = RolloutDataModule(
        train=CountdownProblems("train", 64),
        reward=LengthPenalty(SAMPLING.max_new_tokens),  # a random model gets nothing right, and ends at random places
        val=CountdownProblems("held_out", 4),
        sampling=SAMPLING,
        engine=subject.engine,
        prompts_per_step=8,
        val_samples=2,
        seed=0,
    )
    trainer = L.Trainer(
        accelerator="gpu" if subject.on_gpu else "cpu",
        devices=1,
        precision=default_precision("auto", None),  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[RunCheckpoint(every_n_train_steps=2, dirpath=str(folder / "checkpoints"))],
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(GRPO(model=subject.tiny, lr=1e-3), datamodule=data, ckpt_path=checkpoint)


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))
