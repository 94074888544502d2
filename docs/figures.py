"""Draws the documentation's figures out of committed results of real runs: python docs/figures.py"""

import json
from pathlib import Path

import vl_convert

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
COLOURS = ["#1f6feb", "#d4690b", "#2da44e", "#8250df", "#bf3989", "#6e7781", "#9a6700", "#0a7d91"]
CONFIG = {"background": "white", "font": "sans-serif", "view": {"stroke": None}, "axis": {"gridColor": "#eee"}}


def draw(name: str, spec: dict) -> None:
    (HERE / "figures").mkdir(exist_ok=True)
    (HERE / "figures" / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec | {"config": CONFIG}) + "\n")


def objectives() -> None:
    """Held-out accuracy on the sums, seed 0, one curve an objective."""
    runs = json.loads((RESULTS / "runs.json").read_text())
    rows = [
        {"objective": name.removeprefix("sums/"), "step": int(step), "accuracy": value}
        for name, seeds in runs.items()
        if name.startswith("sums/")
        for step, value in seeds["seed 0"]["held_out_avg@8"].items()
    ]
    last = {row["objective"]: row for row in sorted(rows, key=lambda row: row["step"])}
    order = sorted(last, key=lambda name: -last[name]["accuracy"])
    x = {"field": "step", "type": "quantitative", "title": "optimizer step", "scale": {"domain": [0, 70]}}
    y = {"field": "accuracy", "type": "quantitative", "title": "held-out avg@8", "scale": {"domain": [0.3, 0.8]}}
    colour = {"field": "objective", "sort": order, "scale": {"domain": order, "range": COLOURS}, "legend": None}
    labels = {"type": "text", "align": "left", "dx": 5}
    draw("objectives", {
        "width": 620, "height": 300, "encoding": {"x": x, "y": y, "color": colour},
        "layer": [
            {"data": {"values": rows}, "mark": {"type": "line", "point": True}},
            {"data": {"values": [row for row in last.values() if row["step"] == 60]}, "mark": labels,
             "encoding": {"text": {"field": "objective"}}},
            {"data": {"values": [{**last["prerl"], "objective": "prerl; nsr_rl and nsr_prerl below"}]},
             "mark": {**labels, "dy": -6, "color": "#6e7781"},
             "encoding": {"text": {"field": "objective"}, "color": {"value": "#6e7781"}}},
        ],
    })  # fmt: skip


def costs() -> None:
    """Seconds of forward and backward: the paper's amount of work and ours, SmolLM2-135M in bf16."""
    found = json.loads((RESULTS / "paper_arithmetic.json").read_text())["smollm2-135m few-shot bf16"]
    cases = {name: values for name, values in found.items() if isinstance(values, dict) and "ours_s" in values}
    rows = [
        {"case": name, "who": who, "seconds": values[key]}
        for name, values in cases.items()
        for who, key in (("the paper's amount of work", "theirs_s"), ("ours", "ours_s"))
    ]
    draw("costs", {
        "width": 480, "height": {"step": 14}, "data": {"values": rows}, "mark": "bar",
        "encoding": {
            "y": {"field": "case", "type": "nominal", "title": None, "sort": list(cases), "axis": {"labelLimit": 300}},
            "yOffset": {"field": "who", "sort": ["the paper's amount of work", "ours"]},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds, few-shot prompts, 4 x 8 responses"},
            "color": {"field": "who", "title": None, "scale": {"range": ["#b6bcc4", "#1f6feb"]},
                      "sort": ["the paper's amount of work", "ours"], "legend": {"orient": "top", "labelLimit": 300}},
        },
    })  # fmt: skip


if __name__ == "__main__":
    objectives()
    costs()
