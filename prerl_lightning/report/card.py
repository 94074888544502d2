"""A trained model's card for the Hugging Face hub: what it was trained from, by and on, and what came of it."""

import re
from collections.abc import Iterator

import yaml

from prerl_lightning.report import words
from prerl_lightning.report.files import inside
from prerl_lightning.report.runs import Run, chain


def card(run: Run) -> str:
    """Markdown, with the hub's header. Of paths the last part alone: others' machines are nobody's business."""
    base = str(run.info.get("model") or "")
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(".") else {}),
        "tags": ["rlvr", "prerl-lightning", *(re.sub(r"[^\w.-]", "-", name.lower()) for name, _ in run.lives)],
    }
    return "\n".join(["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", *_body(run), ""])


def _body(run: Run) -> Iterator[str]:
    yield f"# {run.name}"
    yield ""
    yield _last_parts(f"{words.model(run)}, trained by prerl-lightning with {chain(run)}; {run.status()[1]}.")
    yield ""
    yield "| life | objective | from step |"
    yield "| --- | --- | --- |"
    for number, (objective, first) in enumerate(run.lives, start=1):
        yield f"| {number} | {objective} | {first:,} |"
    for label, key in (("trained on", "train"), ("held out", "val")):
        if said := words.problems(run, key):
            yield f"\n{label}: {_last_parts(said)}"
    if measured := [*_measures(run)]:
        yield ""
        yield from measured
    yield "\n## How"
    yield ""
    sampling = inside(run.config, "data", "sampling")
    facts = {
        "prompts a step": inside(run.config, "data").get("prompts_per_step"),
        "responses a prompt": sampling.get("group_size"),
        "tokens a response, at most": sampling.get("max_new_tokens"),
        "precision": run.info.get("precision"),
        "seed": run.seed,
        "ranks": run.info.get("world_size"),
        "machine": words.machine(run),
        "versions": ", ".join(f"{name} {version}" for name, version in inside(run.info, "versions").items()) or None,
    }
    yield from (f"- {name}: {value}" for name, value in facts.items() if value is not None)
    yield from (f"- warned: {_last_parts(warning)}" for warning in run.warnings)


def _measures(run: Run) -> Iterator[str]:
    """Of held-out columns with an interval, first and last."""
    known = sorted({name[:-4] for row in run.validation.values() for name in row if name.endswith("/low")})
    steps = sorted({step for name in known for step in run.column(name)})
    if not steps:
        return
    ends = sorted({steps[0], steps[-1]})
    yield f"| held out, with 95 % intervals over problems | {' | '.join(f'step {step:,}' for step in ends)} |"
    yield f"| --- |{' --- |' * len(ends)}"
    for name in known:
        value, low, high = (run.column(f"{name}{end}") for end in ("", "/low", "/high"))
        cells = [
            f"{words.figure(value.get(s))} [{words.figure(low.get(s))}, {words.figure(high.get(s))}]" for s in ends
        ]
        yield f"| {name.removeprefix('val/')} | {' | '.join(cells)} |"


def _last_parts(text: str) -> str:
    return re.sub(r"(?<![\w.-])(?:[/~]|\.{1,2}/)[^\s,;()]*/", "", text)
