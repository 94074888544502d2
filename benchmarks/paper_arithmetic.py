"""Our NSR-PreRL and GRPO gradients against the amount of work that the paper's code spends on the same rollout.

    python benchmarks/paper_arithmetic.py MODEL [--shapes few-shot math] [--repeats 5]

Theirs is written here after its description: per step log-probs of (x, y) and of y without gradient; then, in the
first life, forward and backward of both with the conditional loss multiplied by zero; in the second of (x, y) alone.
Every response takes part. Without flash attention, that is on a CPU, their code pads: here only to the longest row of
a micro-batch, where theirs goes to the configured maximum. Their diagnostics (top-100 of the vocabulary) are left out.
Both sides: same model, dtype, autocast, token budget, no gradient checkpointing, gradients compared. The two sides and
all cells alternate within each repeat; the figures are medians, by the clock and of CPU time, which a busy host of a
virtual machine distorts less.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor

from prerl_lightning.objectives import GRPO, NSRPreRL, PolicyModule
from prerl_lightning.objectives.advantages import group_advantages
from prerl_lightning.types import Prompt, Response, Rollout

RESULTS = Path(__file__).parent / "results" / "paper_arithmetic.json"
SHAPES = {"few-shot": (159, 21), "math": (150, 500), "embedded": (10, 25)}
GROUP = 8


def make_rollout(n_prompts: int, shape: str, rewards: list[float], vocab: int) -> Rollout:
    """Random tokens; response lengths uniform within 50 % of the shape's mean, prompts within 10 %."""
    generator = torch.Generator().manual_seed(0)
    prompt, answer = SHAPES[shape]

    def ids(mean: int, spread: float) -> tuple[int, ...]:
        length = int(torch.randint(int(mean * (1 - spread)), int(mean * (1 + spread)) + 1, (1,), generator=generator))
        return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

    responses = [ids(answer, 0.5) for _ in range(n_prompts * GROUP)]
    return Rollout.of(
        [Prompt(i, ids(prompt, 0.1), "", "") for i in range(n_prompts)],
        [Response(r, [-1.0] * len(r), "", False) for r in responses],
        group_ids=torch.arange(n_prompts).repeat_interleave(GROUP),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        policy_version=0,
        temperature=1.0,
    )


def rewards_with_negatives(n: int, share: float) -> list[float]:
    """Every group mixed, so many responses wrong."""
    negatives = round(n * share)
    groups = n // GROUP
    wrong = [negatives // groups + (g < negatives % groups) for g in range(groups)]
    return [float(i >= wrong[g]) for g in range(groups) for i in range(GROUP)]


def rewards_with_zero_advantage(n: int, share: float) -> list[float]:
    """So many groups all right, the others half and half."""
    groups = n // GROUP
    equal = round(groups * share)
    return [float(g < equal or i % 2) for g in range(groups) for i in range(GROUP)]


def token_log_probs(model: torch.nn.Module, contexts: list, responses: list) -> list[Tensor]:
    """Padded rows, logits of every token."""
    rows = [[*c, *r] for c, r in zip(contexts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    log_probs = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return [
        log_probs[i, len(c) - 1 : len(c) - 1 + len(r)] for i, (c, r) in enumerate(zip(contexts, responses, strict=True))
    ]


def their_step(model: torch.nn.Module, rollout: Rollout, prefix: int, life: str, budget: int) -> None:
    prompts = [rollout.prompts[int(g)].token_ids for g in rollout.group_ids]
    responses = [r.token_ids.tolist() for r in rollout.responses]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    size = max(1, budget // width)
    cuts = [range(i, min(i + size, len(responses))) for i in range(0, len(responses), size)]
    spaces = {"xy": prompts, "y": [(prefix,)] * len(responses)}
    with torch.no_grad():
        old = {k: [p for cut in cuts for p in part(model, contexts, responses, cut)] for k, contexts in spaces.items()}
    normalisation = "std" if life == "GRPO" else "mean"
    advantages = group_advantages(rollout.rewards, rollout.group_ids, normalisation)
    contributing = advantages < 0 if life == "NSRPreRL" else torch.ones(len(responses), dtype=torch.bool)
    denominator = sum(len(r) for r, c in zip(responses, contributing, strict=True) if c)
    model.zero_grad(set_to_none=True)
    for cut in cuts:
        loss = torch.zeros(())
        for space in ("xy",) if life == "GRPO" else ("xy", "y"):
            coefficient = float(life == "GRPO" or space == "y")
            for i, log_probs in zip(cut, part(model, spaces[space], responses, cut), strict=True):
                surrogate = -advantages[i] * (log_probs - old[space][i]).exp()
                loss = loss + coefficient * float(contributing[i]) * surrogate.sum() / denominator
        loss.backward()


def part(model: torch.nn.Module, contexts: list, responses: list, cut: range) -> list[Tensor]:
    return token_log_probs(model, [contexts[i] for i in cut], [responses[i] for i in cut])


def our_step(module: PolicyModule, rollout: Rollout) -> None:
    update = module.make_update(rollout)
    update.backward([update.work(t) for t in module.terms], torch.ones(len(rollout)).bool(), True)


def flat_gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


def seconds(step) -> tuple[float, float]:
    """By the clock, and of CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["few-shot", "math"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="0: compare gradients only")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch, both sides")
    parser.add_argument("--cells", nargs="+", default=[""], help="those whose name holds one of these texts")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    args = parser.parse_args()
    modules = {}
    for objective in (GRPO, NSRPreRL):
        first = next(iter(modules.values()), None)
        module = objective(model=args.model, max_tokens_per_microbatch=args.budget)
        if first is None:
            module.configure_model()
        else:
            module.policy = first.policy
        modules[objective.__name__] = module
    policy = modules["GRPO"].live_policy
    vocab = min(policy.model.config.vocab_size, 40_000)
    n = args.prompts * GROUP
    cells = {f"NSRPreRL, {s:.0%} negatives": rewards_with_negatives(n, s) for s in (0.15, 0.3, 0.5)}
    for share in (0, 0.45, 0.75):
        equal = round(args.prompts * share)  # with 4 prompts 45 % is 50 %, and the name says so
        cells[f"GRPO, {equal / args.prompts:.0%} zero advantage"] = rewards_with_zero_advantage(n, share)
    cells = {name: rewards for name, rewards in cells.items() if any(part in name for part in args.cells)}
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for shape in args.shapes:
        rollouts = {name: make_rollout(args.prompts, shape, rewards, vocab) for name, rewards in cells.items()}
        ours: dict[str, list[tuple[float, float]]] = {name: [] for name in cells}
        theirs: dict[str, list[tuple[float, float]]] = {"NSRPreRL": [], "GRPO": []}
        errors = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            for repeat in range(args.repeats + 1):
                for name, rollout in rollouts.items():
                    life = name.split(",")[0]
                    module = modules[life]
                    ours[name].append(seconds(lambda m=module, r=rollout: our_step(m, r)))
                    gradient = flat_gradient(policy)
                    # what they spend does not depend on the rewards: once a repeat; and once a cell, for its gradient
                    if repeat == 0 or len(theirs[life]) == repeat:
                        args_of = (policy.model, rollout, module.prefix_id if life != "GRPO" else 1, life, args.budget)
                        spent = seconds(lambda a=args_of: their_step(*a))
                        if len(theirs[life]) == repeat:
                            theirs[life].append(spent)
                    if repeat == 0:
                        expected = flat_gradient(policy)
                        errors[name] = float((gradient - expected).norm() / expected.norm())
                print(f"{shape}: repeat {repeat} of {args.repeats}, theirs {theirs}", flush=True)
        for name in cells:
            life = name.split(",")[0]
            row: dict[str, float] = {}
            for i, unit in enumerate(("s", "cpu_s") if args.repeats else ()):
                a, b = (statistics.median(t[i] for t in times[1:]) for times in (theirs[life], ours[name]))
                row |= {f"theirs_{unit}": round(a, 3), f"ours_{unit}": round(b, 3), f"ratio_{unit}": round(a / b, 1)}
            row["gradient_difference"] = float(f"{errors[name]:.1e}")
            key = f"{Path(args.model).name} {shape} {'bf16' if args.bf16 else 'fp32'}"
            found.setdefault(key, {"prompts": args.prompts, "budget": args.budget})[name] = row
            print(f"| {key} | {name} | {' | '.join(map(str, row.values()))} |", flush=True)
        found["machine"] = describe()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
