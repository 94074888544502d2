"""PPO as second life: held-out accuracy by step of `configs/dsrl_ppo.yaml`, seed by seed.

    python benchmarks/ppo.py                       # seeds 0 to 4, about five minutes each on two cores
    python benchmarks/ppo.py --seeds 0 1

Results go to benchmarks/results/ppo.json, a seed replacing its earlier run. What stands behind -- goes to `prerl fit`.
"""

import argparse
import json
import sys

from machine import describe
from runs import RESULTS, measure

OWN = RESULTS.with_name("ppo.json")
KEPT = ("held_out_avg@8", "held_out_thoughts/wait", "reward", "median_step_seconds", "seconds")


def main() -> None:
    args = sys.argv[1:]
    more = args[args.index("--") + 1 :] if "--" in args else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args(args[: args.index("--")] if "--" in args else args)
    for seed in options.seeds:
        result = measure("dsrl_ppo", seed, more)
        found = json.loads(OWN.read_text()) if OWN.is_file() else {}
        found[f"seed {seed}"] = {key: result[key] for key in KEPT}
        found["machine"] = describe()
        OWN.write_text(json.dumps(found, indent=1) + "\n")
        print(seed, result["held_out_avg@8"], flush=True)


if __name__ == "__main__":
    main()
