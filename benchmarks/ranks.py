"""The train step on 2 ranks of one core against 1 rank of one core: the same global rollout, ddp.

    python benchmarks/ranks.py MODEL

Rewards are random, so that the ranks' own shares of what contributes differ. Seconds are of Update.backward alone
(forward, backward and gradient reduction), medians over repeats; 1 and 2 ranks in turns, in processes of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "ranks.json"


def rank_main(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from paper_arithmetic import GROUP, make_rollout
    from torch.nn.parallel import DistributedDataParallel

    from prerl_lightning.objectives import GRPO, NSRPreRL

    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (args.prompts * GROUP,), generator=generator).tolist()
    rollout = make_rollout(args.prompts, args.shape, [float(r) for r in rewards], 25)
    modules = [cls(model=args.model, max_tokens_per_microbatch=args.budget) for cls in (GRPO, NSRPreRL)]
    modules[0].configure_model()
    policy = modules[1].policy = modules[0].live_policy
    wrapped = DistributedDataParallel(policy) if world > 1 else None

    found = {}
    for module in modules:
        times = []
        for _ in range(args.repeats + 1):
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            update = module.make_update(rollout, **({"no_sync": wrapped.no_sync} if wrapped else {}))
            if wrapped:  # DDP's hooks are in its forward
                update.passes.forward = lambda batch, entropy=False: wrapped(batch, rollout.temperature, entropy)
            update.backward([update.work(t) for t in module.terms], torch.ones(len(rewards)).bool(), True)
            times.append(time.perf_counter() - start)
        found[type(module).__name__] = times[1:]
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    if world > 1:
        dist.barrier()


def run(argv: list[str], world: int) -> dict:
    processes = []
    cores = sorted(os.sched_getaffinity(0))
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
        command = ["taskset", "-c", str(cores[rank]), sys.executable, __file__, *argv, "--as-rank"]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [p.communicate()[0] for p in processes]
    if any(p.returncode for p in processes):
        sys.exit("a rank failed")
    return json.loads(outputs[0].strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shape", default="embedded")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        return rank_main(args)
    from machine import describe

    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.turns):
        for world in (1, 2):
            for objective, times in run(sys.argv[1:], world).items():
                seconds.setdefault((objective, world), []).extend(times)
    result: dict = {}
    for objective in ("GRPO", "NSRPreRL"):
        one, two = (statistics.median(seconds[objective, n]) for n in (1, 2))
        result[objective] = {"1 rank": round(one, 3), "2 ranks": round(two, 3), "speedup": round(one / two, 2)}
        print(f"| {args.shape} | {objective} | {one:.3f} s | {two:.3f} s | {one / two:.2f}x |", flush=True)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found[f"{Path(args.model).name} {args.shape}"] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**found, "machine": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
