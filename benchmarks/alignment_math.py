"""Do log p(y) and log p(y|x) pull the same way on a real model's own answers to MATH, and where?

No training; a CPU will do: two minutes an answer for SmolLM2-135M on one core, ten for a model of 0.5 B.

    python benchmarks/alignment_math.py measure models/smollm2-135m --data math_train.parquet --answers 24
    python benchmarks/alignment_math.py measure models/qwen2.5-coder-0.5b --data math_train.parquet --answers 8
    python benchmarks/alignment_math.py summary

``measure`` draws problems and answers at temperature 1 and compares the gradients (metrics/alignment.py) of

- the first 32, 64, 128 ... tokens of each answer, and of the stretches between: one answer cut at many lengths tells
  length from difficulty;
- of its first 256 tokens, those in each range of p(y_t | x, y_<t);
- the same 256 tokens behind a restated question, put there by force, so that log p(y) holds it: of all, and of the
  answer's alone, which is what the plain ones are to be compared with.

A line an answer goes to benchmarks/results/alignment_math/MODEL.jsonl; a killed or longer measurement goes on where it
stopped. ``summary`` makes alignment_math.json and alignment_math.png of these files, with 95 % intervals by a bootstrap
over answers.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from transformers import AutoModelForCausalLM, AutoTokenizer

from prerl_lightning.data.prompts import PromptFormat
from prerl_lightning.data.readers import Files
from prerl_lightning.metrics.alignment import (
    EDGES,
    GROUPS,
    GradientComparison,
    GradientPair,
    probabilities,
)
from prerl_lightning.metrics.evaluation import bootstrap
from prerl_lightning.policy.model import Policy, prefix_token
from prerl_lightning.rewards import boxed_reward
from prerl_lightning.types import Prompt

RESULTS = Path(__file__).parent / "results"
LENGTHS = (0, 32, 64, 128, 256, 512, 1024)
CUT = 256  # tokens of an answer that are compared by probability and behind a restated question
STRETCHES = [f"{a}_to_{b}" for a, b in pairwise(LENGTHS)]
BINS = [f"{a:g}_to_{b:g}" for a, b in pairwise(EDGES)]
BATCH = 8  # answers sampled together; part of what a seed draws


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole ones: a kill may leave a part of one at the end."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def sampled(model: str, data: str, n: int, longest: int, path: Path) -> list[dict[str, Any]]:
    """n answers, {row, question, prompt, ids, right, truncated} each; those that ``path`` lacks are drawn now."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = Files(data)
    problems.load()
    rows = random.Random(0).sample(range(len(problems)), len(problems))
    found, lm = lines(path), None
    while len(found) < n:
        lm = lm or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        drawn = [problems[i] for i in rows[len(found) : len(found) + BATCH]]
        if not drawn:
            raise SystemExit(f"--answers {n}: {data} has {len(problems)} problems.")
        prompts = [PromptFormat().encode([p], tokenizer)[0] for p in drawn]
        append(path, answers(lm, tokenizer, prompts, [p.prompt[-1]["content"] for p in drawn], longest, len(found)))
        found = lines(path)
    return found[:n]


def answers(
    lm: Any, tokenizer: Any, prompts: list[Prompt], questions: list[str], longest: int, seed: int
) -> list[dict[str, Any]]:
    ids, mask = (torch.zeros(len(prompts), max(len(p.token_ids) for p in prompts), dtype=torch.long) for _ in range(2))
    for i, prompt in enumerate(prompts):  # padded on the left
        ids[i, -len(prompt.token_ids) :], mask[i, -len(prompt.token_ids) :] = torch.tensor(prompt.token_ids), 1
    torch.manual_seed(seed)
    free = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    out = lm.generate(ids, attention_mask=mask, max_new_tokens=longest, pad_token_id=0, **free)[:, ids.shape[1] :]
    ends = lm.generation_config.eos_token_id
    found = []
    for prompt, question, row in zip(prompts, questions, out.tolist(), strict=True):
        stop = next((t + 1 for t, token in enumerate(row) if token in np.atleast_1d(ends)), None)
        text = tokenizer.decode(row[:stop], skip_special_tokens=True)
        extra = {**prompt.extra, "truncated": stop is None}
        found.append(
            {
                "row": prompt.row,
                "question": tokenizer(question + "\n\n", add_special_tokens=False)["input_ids"],
                "prompt": list(prompt.token_ids),
                "ids": row[:stop],
                "right": float(boxed_reward(prompt.text, text, prompt.ground_truth, extra)),
                "truncated": stop is None,
            }
        )
    return found


def described(comparison: GradientComparison, pair: GradientPair) -> dict[str, Any]:
    products = comparison.products(pair)
    found = {
        "cosine": products.cosine,
        "inner_product": products.inner_product,
        "norm_conditional": float(products.aa.sum().sqrt()),
        "norm_marginal": float(products.bb.sum().sqrt()),
        "log_prob": float(pair.log_probs.sum()),
        "marginal_log_prob": float(pair.marginal_log_probs.sum()),
    }
    layers = {k: short(v) for k, v in products.by_group.items()}
    return {"tokens": len(pair.log_probs), **{k: short(v) for k, v in found.items()}, "layers": layers}


def short(value: float) -> float | None:
    """Six digits; None where there is no number, as of the cosine of a gradient of 0."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def measured(comparison: GradientComparison, prefix: int, answer: Mapping[str, Any], longest: int) -> dict[str, Any]:
    start = time.perf_counter()
    ids, question = np.array(answer["ids"][:longest]), np.array(answer["question"])
    at, whole = np.arange(len(ids)), None
    first: dict[str, Any] = {}
    stretches: dict[str, Any] = {}
    for low, high in pairwise(LENGTHS):
        if low < len(ids):
            pair = comparison.pair(answer["prompt"], prefix, ids, 1.0, (at >= low) & (at < high))
            if high <= len(ids):
                stretches[f"{low}_to_{high}"] = described(comparison, pair)
            whole = whole.extended(pair) if whole else pair
            first[str(min(high, len(ids)))] = described(comparison, whole)
    assert whole is not None
    start_of_it = ids[:CUT]
    by_probability = {
        name: described(comparison, comparison.pair(answer["prompt"], prefix, start_of_it, 1.0, tokens))
        for name, tokens in probabilities(whole.log_probs[:CUT]).items()
        if tokens.any()
    }
    restating = np.concatenate([question, start_of_it])
    of_question = np.arange(len(restating)) < len(question)
    both = [comparison.pair(answer["prompt"], prefix, restating, 1.0, part) for part in (of_question, ~of_question)]
    restated = {"answer": described(comparison, both[1]), "all": described(comparison, both[0].extended(both[1]))}
    return {
        "row": answer["row"],
        "right": answer["right"],
        "truncated": answer["truncated"],
        "tokens": len(ids),
        "prompt_tokens": len(answer["prompt"]),
        "question_tokens": len(question),
        "first": first,
        "stretches": stretches,
        "probability": by_probability,
        "restated": restated,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(model: str, data: str, n: int, longest: int, results: Path) -> None:
    name = Path(model).name
    out = results / "alignment_math" / f"{name}.jsonl"
    todo = sampled(model, data, n, longest, results / "alignment_math" / f"{name}.answers.jsonl")[len(lines(out)) :]
    if not todo:
        return
    policy = Policy.from_pretrained(model)
    comparison, prefix = GradientComparison(policy), prefix_token(AutoTokenizer.from_pretrained(model), None)
    for answer in todo:
        row = measured(comparison, prefix, answer, longest) | {"sketch": comparison.sketch}
        append(out, [row])
        shown = " ".join(f"{length}:{p['cosine']}" for length, p in row["first"].items())
        print(f"{name} row {row['row']} ({row['seconds']} s): {shown}", flush=True)


# ---------------------------------------------------------------------- what the files say


def mean(values: Iterable[float | None]) -> dict[str, Any] | None:
    """With its interval, and of how many."""
    found = torch.tensor([v for v in values if v is not None and np.isfinite(v)], dtype=torch.float64)
    if not len(found):
        return None
    low, high = torch.quantile(bootstrap(found), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    numbers = {"mean": float(found.mean()), "low": low, "high": high, "least": float(found.min())}
    return {k: round(v, 4) for k, v in numbers.items()} | {"answers": len(found)}


def cosines(rows: Iterable[Mapping[str, Any]], key: str, names: Iterable[Any]) -> dict[str, Any]:
    rows = list(rows)
    found = {str(name): mean(r[key].get(str(name), {}).get("cosine") for r in rows) for name in names}
    return {name: value for name, value in found.items() if value}


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wholes = [list(r["first"].values())[-1] for r in rows]
    cut = [r["first"][str(min(CUT, r["tokens"]))] for r in rows]
    restated = [r["restated"] for r in rows]
    every = [p["inner_product"] for r in rows for p in r["first"].values()]
    information = {
        name: mean(
            (s["log_prob"] - s["marginal_log_prob"]) / s["tokens"] for r in rows if (s := r["stretches"].get(name))
        )
        for name in STRETCHES
    }
    long = [r for r in rows if r["tokens"] >= 512]
    return {
        "answers": len(rows),
        "right": sum(r["right"] for r in rows),
        "tokens": [r["tokens"] for r in rows],
        "sketch": rows[0]["sketch"],
        "negative_inner_products": f"{sum(x < 0 for x in every)} of {len(every)}",
        "whole_answer": mean(p["cosine"] for p in wholes),
        "first_tokens": cosines(rows, "first", LENGTHS[1:]),
        "first_tokens_of_answers_of_512_or_more": cosines(long, "first", LENGTHS[1:]),
        "stretch": cosines(rows, "stretches", STRETCHES),
        "nats_a_token_that_the_prompt_is_worth": {k: v for k, v in information.items() if v},
        "probability": cosines(rows, "probability", BINS),
        "layers": {g: mean(p["layers"].get(g) for p in wholes) for g in GROUPS},
        f"first_{CUT}": {
            "plain": mean(p["cosine"] for p in cut),
            "restated, the answer's tokens": mean(r["answer"]["cosine"] for r in restated),
            "restated, all tokens": mean(r["all"]["cosine"] for r in restated),
            "gain of the answer's tokens": mean(
                r["answer"]["cosine"] - p["cosine"] for r, p in zip(restated, cut, strict=True)
            ),
        },
    }


def panel(title: str, x_title: str, rows: list[dict[str, Any]], order: list[str]) -> dict[str, Any]:
    rows = [{**row, "x": row["x"].replace("_to_", " to ")} for row in rows]
    order = [name.replace("_to_", " to ") for name in order]
    x = {"field": "x", "type": "ordinal", "sort": order, "title": x_title, "axis": {"labelAngle": -35}}
    y = {"type": "quantitative", "title": "cosine", "scale": {"domain": [min([0, *(r["low"] for r in rows)]), 1]}}
    colour = {"field": "model", "type": "nominal", "title": None, "legend": {"orient": "bottom"}}
    shift = {"field": "model"}
    return {
        "title": {"text": title, "fontSize": 12},
        "width": 250,
        "height": 200,
        "layer": [
            {
                "data": {"values": [{"y": 0.92}]},
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": "#666"},
                "encoding": {"y": {"field": "y", **y}},
            },
            {
                "data": {"values": rows},
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "x": x,
                    "xOffset": shift,
                    "color": colour,
                    "y": {"field": "low", **y},
                    "y2": {"field": "high"},
                },
            },
            {
                "data": {"values": rows},
                "mark": {"type": "point", "filled": True, "size": 45},
                "encoding": {"x": x, "xOffset": shift, "color": colour, "y": {"field": "mean", **y}},
            },
        ],
    }


def draw(models: Mapping[str, Any], out: Path) -> None:
    import vl_convert

    def rows(key: str) -> list[dict[str, Any]]:
        return [{"model": m, "x": x, **v} for m, found in models.items() for x, v in found[key].items() if v]

    layers = [g for g in GROUPS if any(found["layers"][g] for found in models.values())]
    behind = [r for r in rows(f"first_{CUT}") if not r["x"].startswith("gain")]
    panels = [
        panel("the first tokens of an answer", "tokens", rows("first_tokens"), list(map(str, LENGTHS[1:]))),
        panel("a stretch alone", "tokens", rows("stretch"), STRETCHES),
        panel("by probability", "p(y_t | x, y_<t)", rows("probability"), BINS),
        panel("by layers, whole answers", "layers", rows("layers"), layers),
        panel(f"first {CUT} tokens, question restated", "", behind, [r["x"] for r in behind[:3]]),
    ]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": "Cosine of gradients of log p(y) and log p(y|x) on own answers to MATH; 95 % intervals; line 0.92",
        "background": "white",
        "concat": panels,
        "columns": 3,
    }
    out.write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))


def summary(results: Path) -> None:
    files = [p for p in sorted((results / "alignment_math").glob("*.jsonl")) if not p.name.endswith(".answers.jsonl")]
    models = {p.stem: summarised(rows) for p in files if (rows := lines(p))}
    if not models:
        raise SystemExit(f"Nothing is measured yet in {results / 'alignment_math'}: python {__file__} measure ...")
    found = {"machine": describe(), "models": models}
    (results / "alignment_math.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(models, results / "alignment_math.png")
    print(json.dumps(models, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("measure")
    one.add_argument("model")
    one.add_argument("--data", required=True, help="verl's math_train.parquet")
    one.add_argument("--answers", type=int, default=24)
    one.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens of an answer")
    what.add_parser("summary")
    own = parser.parse_args()
    if own.what == "measure":
        measure(own.model, own.data, own.answers, own.longest, own.results)
    else:
        summary(own.results)


if __name__ == "__main__":
    main()
