"""Seconds and memory until a large problem set is ready to be drawn from, and what a batch of its prompts takes then.

    python benchmarks/data.py [lines] [parquet] [dapo] [--model MODEL]

A million rows of JSON lines and of parquet, of 250 characters a question, and DAPO-Math-17k's shape: 17,398 problems in
uneven copies, 184,200 rows of verl's parquet. Each in a process of its own: opened, checked, folded, the first 10,000
prompts tokenised. `datasets` copies a parquet file to its cache at the first time: ``seconds`` are of the second.
Memory is the process's own, without what it shares with the page cache.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "data.json"
MILLION, DAPO_ROWS, DAPO_PROBLEMS = 1_000_000, 184_200, 17_398
STORY = "A train leaves the first town at noon and goes 3 miles an hour faster than the one behind it. "


@lru_cache
def rows(number: int) -> dict[str, list]:
    rng = random.Random(0)
    questions = [f"{i}. {STORY[: rng.randrange(20, 95)] * 4} When?" for i in range(number)]
    return {"question": questions, "answer": [str(rng.randrange(10**6)) for _ in questions], "level": [3] * number}


def make(case: str, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if case == "dapo":
        some, rng = rows(DAPO_PROBLEMS), random.Random(0)
        order = [*range(DAPO_PROBLEMS), *(rng.randrange(DAPO_PROBLEMS) for _ in range(DAPO_ROWS - DAPO_PROBLEMS))]
        found = [
            {
                "prompt": [{"role": "user", "content": some["question"][i]}],
                "reward_model": {"style": "rule", "ground_truth": some["answer"][i]},
                "data_source": "math_dapo",
            }
            for i in order
        ]
        pq.write_table(pa.Table.from_pylist(found), path)
    elif case == "parquet":
        pq.write_table(pa.table(rows(MILLION)), path)
    else:
        columns = rows(MILLION)
        with path.open("w") as file:
            for values in zip(*columns.values(), strict=True):
                file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")


def memory() -> float:
    """MiB of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure(path: str, prompt: str, model: str) -> None:
    from prerl_lightning.data.prompts import CHECKED, PromptFormat, encode_all
    from prerl_lightning.data.readers import Files
    from prerl_lightning.policy.model import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template or "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    import datasets  # noqa: F401  (seconds of its own, whatever the size)

    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    problems = Files(path, prompt=prompt)
    problems.load()
    opened, opened_cpu = time.perf_counter() - start, time.process_time() - cpu
    prompts = encode_all(problems, "data.train", PromptFormat(), tokenizer, 10**6, 10**6, "drop", CHECKED)
    seconds, ready_cpu = time.perf_counter() - start, time.process_time() - cpu
    mib = memory() - before
    start = time.perf_counter()
    for i in range(128):
        prompts[i * len(prompts) // 128]
    found = {"problems": len(prompts), "opened_seconds": opened, "seconds": seconds, "memory_mib": mib}
    found |= {"opened_cpu_seconds": opened_cpu, "cpu_seconds": ready_cpu}
    print(
        json.dumps({k: round(v, 2) for k, v in (found | {"batch_of_128_seconds": time.perf_counter() - start}).items()})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all; what was measured of the others before is kept")
    parser.add_argument("--model", default="embedded-sums")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure, args.model)
    from machine import describe

    found: dict = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found |= {"machine": describe(), "model": args.model}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        for case, name in (("lines", "rows.jsonl"), ("parquet", "rows.parquet"), ("dapo", "dapo.parquet")):
            if args.cases and case not in args.cases:
                continue
            path = Path(folder) / name
            make(case, path)
            prompt = "prompt" if case == "dapo" else "question"
            command = [sys.executable, __file__, "--model", args.model, "--measure", str(path), prompt]
            for turn in ("first", "again") if path.suffix == ".parquet" else ("again",):
                output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                row = json.loads(output.splitlines()[-1]) | {"file_mib": round(path.stat().st_size / 2**20)}
                found[case if turn == "again" else f"{case}_first"] = row
                print(case, turn, row, flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
