"""Which figures the page has: a list of what may be drawn, of which those with data are taken."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prerl_lightning.report.files import inside
from prerl_lightning.report.runs import Run

Series = tuple[tuple[str, str], ...]  # (label, column); the first is solid, the others are dashed


@dataclass(frozen=True)
class Figure:
    key: str
    section: str
    title: str
    series: Series = ()
    views: dict[str, Series] = field(default_factory=dict)
    """Of a figure whose content a switch of its section chooses: the switch's value to series."""
    note: str = ""
    format: str = ".3~g"
    """d3's, of the axis and the values."""
    zero: bool = False
    """The axis begins at 0."""
    rule: float | None = None
    """A level to compare with."""
    wide: bool = False
    kind: str = "lines"

    @property
    def of_responses(self) -> bool:
        """Single ones, of alignment.jsonl: by step (``points``) or by their tokens (``lengths``)."""
        return self.kind in ("points", "lengths")

    @property
    def columns(self) -> list[str]:
        found = [c for _, c in self.series] + [c for view in self.views.values() for _, c in view]
        return list(dict.fromkeys(found))


SHARE, COUNT = ".2~%", "~s"
RIGHT_WRONG = ("right", "wrong")
# time/step is the sum of all but the last; time/alignment is a part of time/watchers
TIMES = ("rollout", "reward", "forward_backward", "optimizer", "update_weights", "statistics", "other", "watchers")
LAYERS, POSITION, PROBABILITY = "alignment/layers/", "alignment/position/", "alignment/probability/"


def columns_of(runs: Iterable[Run]) -> set[str]:
    """That have a value in some run."""
    return {name for run in runs for rows in (run.training, run.validation) for row in rows.values() for name in row}


def families(runs: Sequence[Run]) -> list[str]:
    """Of thoughts, in the order of run.json, then by name."""
    said = {str(name): None for run in runs for name in (run.info.get("thoughts") or {})}
    for column in sorted(columns_of(runs)):
        name = column.removeprefix("val/")
        if name.startswith("thoughts/"):
            for end in ("/right", "/wrong", "/low", "/high", "_per_1k", "_ratio"):
                name = name.removesuffix(end)
            said.setdefault(name.removeprefix("thoughts/"))
    return list(said)


def by_rule(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Families of phrases, which are single words, and SEAL's labels, seal/LABEL."""
    names = list(names)
    seal = [name for name in names if name.startswith("seal/")]
    return [name for name in names if name not in seal], seal


def by_correctness(column: str) -> Series:
    return tuple((which, f"{column}/{which}") for which in RIGHT_WRONG)


def _thoughts(family: str, there: set[str]) -> Figure:
    """Views SOURCE-MEASURE-SPLIT, such as training-count-right."""
    name = f"thoughts/{family}"
    views: dict[str, Series] = {}
    for measure, end in (("ratio", "_ratio"), ("count", ""), ("per_1k", "_per_1k")):
        for source in ("val/", ""):
            column = f"{source}{name}{end}"
            where = "held-out" if source else "training"
            views[f"{where}-{measure}-all"] = (("", column),)
            views[f"{where}-{measure}-both"] = by_correctness(column)
            for which in RIGHT_WRONG:
                views[f"{where}-{measure}-{which}"] = ((which, f"{column}/{which}"),)
    views = {key: found for key, view in views.items() if (found := tuple(s for s in view if s[1] in there))}
    label = family.removeprefix("seal/")
    title, note = (label, "") if label == family else (f"SEAL: {label}", "pieces between blank lines, one label each")
    return Figure(f"thoughts-{family.replace('/', '-')}", "thoughts", title, views=views, zero=True, note=note)


def _measured(runs: Iterable[Run]) -> str:
    """How many responses of a step alignment/... is of: "the 2 responses measured"."""
    counts = {n for run in runs for n in Counter(line["step"] for line in run.alignment).values()}
    if not counts:
        return "the responses measured"
    few, many = min(counts), max(counts)
    return f"the {few} to {many} responses measured" if few < many else f"the {few} response{'s' * (few > 1)} measured"


def _pass(runs: Sequence[Run], there: set[str]) -> list[Figure]:
    """Held-out measures beside avg@K; pass@1 is avg@K."""
    found = []
    for prefix, title in (("val/pass@", "pass@"), ("val/maj@", "maj@")):
        numbers = sorted(int(c.removeprefix(prefix)) for c in there if c.removeprefix(prefix).isdigit())
        for k in [n for n in numbers if n > 1][-1:]:
            found.append(Figure(f"{title}k", "accuracy", f"Held-out {title}{k}", (("", f"{prefix}{k}"),)))
    return [*found, Figure("greedy", "accuracy", "Held-out greedy accuracy", (("", "val/greedy"),))]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """All that have data, in the page's order; what no figure names is in the section "other"."""
    there = columns_of(runs)
    accuracies = dict.fromkeys(run.accuracy for run in runs if run.accuracy)
    chosen = tuple((column.removeprefix("val/"), column) for column in accuracies)
    layers = [c.removeprefix(LAYERS) for c in sorted(there) if c.startswith(LAYERS)]
    parts = [
        sorted((c.removeprefix(p) for c in there if c.startswith(p)), key=numbers) for p in (POSITION, PROBABILITY)
    ]
    order = {name: i for i, name in enumerate(("embedding", "first", "middle", "last", "head"))}
    thirds = {name: f"{name} third of the layers" for name in ("first", "middle", "last")}
    measured = _measured(runs)
    parted = any(line.get("position") or line.get("probability") for run in runs for line in run.alignment)
    over = "; of how many tokens: the table below" if parted else ""
    likelihoods = {n for run in runs if isinstance(n := inside(run.config, "alignment").get("likelihoods"), int)}
    part = likelihoods.pop() if len(likelihoods) == 1 else "some"
    passes = sorted((int(c.removeprefix("rollout/pass@")), c) for c in there if c.startswith("rollout/pass@"))
    ends = [passes[i] for i in ((0, -1) if len(passes) > 1 else (0,))] if passes else []
    known = [
        Figure("accuracy", "accuracy", f"Held-out {chosen[0][0] if chosen else ''}", chosen, wide=True),
        Figure("reward", "accuracy", "Reward of the training rollouts", (("", "reward/mean"),)),
        *_pass(runs, there),
        Figure("train-pass", "accuracy", "pass@k on the training prompts", tuple((f"pass@{k}", c) for k, c in ends)),
        *(_thoughts(family, there) for rule in by_rule(families(runs)) for family in rule),
        Figure("cosine", "alignment", "Cosine of ∇log p(y) and ∇log p(y|x)", (("", "alignment/cosine"),), rule=0.92,
               note=f"mean over {measured} in a step; the line, 0.92, is of a write-up of the paper"),
        Figure("cosine-sign", "alignment", "The same, by the sign of the advantage",
               (("A > 0", "alignment/cosine/positive"), ("A < 0", "alignment/cosine/negative"))),
        Figure("cosine-policy", "alignment", "Cosine of the policy gradients",
               (("", "alignment/policy_gradient/cosine"),), note=f"of {measured}, weighted with r \u2212 mean"),
        Figure("inner", "alignment", "Inner product", (("", "alignment/inner_product"),), zero=True,
               note=f"mean over {measured}"),
        Figure("inner-sign", "alignment", "The same, by the sign of the advantage",
               (("A > 0", "alignment/inner_product/positive"), ("A < 0", "alignment/inner_product/negative")),
               zero=True),
        Figure("inner-policy", "alignment", "Inner product of the policy gradients",
               (("", "alignment/policy_gradient/inner_product"),), zero=True,
               note=f"of {measured}, weighted with r \u2212 mean"),
        Figure("negative", "alignment", "Share of negative inner products", (("", "alignment/negative_share"),),
               format=SHARE, zero=True, note=f"of {measured}"),
        *(Figure(f"layer-{n}", "alignment", f"Cosine: {thirds.get(n, n)}", (("", LAYERS + n),))
          for n in sorted(layers, key=lambda n: (order.get(n, 9), n))),
        Figure("cosine-position", "alignment", "Cosine by position in the response",
               tuple((n.replace("_", " "), f"{POSITION}{n}") for n in parts[0]),
               note=f"stretches of equal length{over}"),
        Figure("cosine-probability", "alignment", "Cosine by the tokens' probability",
               tuple((n.replace("_", " "), f"{PROBABILITY}{n}") for n in parts[1]), note=f"p(y_t | x, y_<t){over}"),
        Figure("cosine-points", "alignment", "Cosine of single responses", kind="points",
               note="one dot a response measured; filled: right, open: wrong"),
        Figure("cosine-length", "alignment", "The same, by response length", kind="lengths", note="tokens"),
        Figure("entropy", "health", "Entropy", (("", "rollout/entropy"),), note="nats a token"),
        Figure("length", "health", "Response length", by_correctness("rollout/response_length"), note="tokens"),
        Figure("length-all", "health", "Response length, all",
               (("training", "rollout/response_length"), ("held out", "val/length")), note="tokens"),
        Figure("truncated", "health", "Truncated responses", (("", "rollout/truncated"),), format=SHARE, zero=True),
        Figure("repetition", "health", "Repetition", (("", "rollout/repetition"),), format=SHARE, zero=True,
               note="share of 4-grams seen before in the response"),
        Figure("log-prob", "health", "log p(y|x), a token", by_correctness("rollout/log_prob")),
        Figure("marginal", "health", "log p(y), a token", by_correctness("rollout/marginal_log_prob"),
               note=f"of {part} responses of a step"),
        Figure("prompts", "health", "Prompts by their answers", tuple(
            (label, f"rollout/groups_{name}") for label, name in
            (("mixed", "mixed"), ("all right", "all_right"), ("all wrong", "all_wrong"))), format=SHARE, zero=True,
            note="with rewards of 0 and 1 only mixed ones have a gradient"),
        Figure("mismatch", "health", "Engine against trainer", (("", "mismatch/log_prob_difference"),), zero=True,
               note="mean absolute difference of log-probs"),
        Figure("mismatch-kl", "health", "Engine against trainer, KL", (("", "mismatch/kl"),)),
        Figure("weights", "health", "Weight change, relative", (("", "weights/relative_change"),), format=".2~%",
               zero=True, note="norm since this life began, over the weights' norm"),
        Figure("grad-norm", "health", "Gradient norm", (("", "optim/grad_norm"),), zero=True),
        Figure("lr", "health", "Learning rate", (("", "optim/lr"),), zero=True, format=".1~e"),
        Figure("loss", "health", "Loss", (("", "optim/loss"),)),
        Figure("clipped", "health", "Clipped tokens", (("", "optim/clipped"),), format=SHARE, zero=True),
        Figure("failures", "health", "Verifications that failed",
               (("timeouts", "reward/timeouts"), ("errors", "reward/errors")), zero=True),
        Figure("stack", "time", "Where a step's seconds go", tuple((t.replace("_", " "), f"time/{t}") for t in TIMES),
               kind="stack", wide=True, zero=True, note="mean over the setting's runs"),
        Figure("step-time", "time", "Seconds a step", (("", "time/step"),), zero=True),
        Figure("rollout-speed", "time", "Rollout, tokens a second", (("", "rollout/tokens_per_second"),),
               zero=True, format=COUNT),
        Figure("train-speed", "time", "Training, tokens a second", (("", "train/tokens_per_second"),),
               zero=True, format=COUNT),
        Figure("mfu", "time", "Model FLOPs utilisation", (("", "train/mfu"),), zero=True, format=SHARE),
    ]  # fmt: skip
    found = [figure for f in known if (figure := _with_data(f, runs, there))]
    drawn = {column for figure in found for column in figure.columns}
    drawn |= {f"{column}{end}" for column in drawn for end in ("/low", "/high")}
    drawn |= {"val/step", "optim/step", "life", "time/since_start"}
    rest = sorted(c for c in there - drawn if not c.endswith(("/low", "/high", "/problems")))
    return [*found, *(Figure(f"other-{c}", "other", c, (("", c),)) for c in rest)]


def numbers(name: str) -> list[float]:
    """0.5_to_0.9 is [0.5, 0.9]."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", name)]


def split_flat(found: Sequence[Figure], runs: Iterable[Run]) -> tuple[list[Figure], list[Figure]]:
    """Those to draw, and those that would be a flat line, since all their values are 0."""
    moving = {
        name for run in runs for rows in (run.training, run.validation) for r in rows.values() for name in r if r[name]
    }
    flat = [f for f in found if f.kind == "lines" and f.section != "accuracy" and not moving.intersection(f.columns)]
    return [f for f in found if f not in flat], flat


def _with_data(figure: Figure, runs: Sequence[Run], there: set[str]) -> Figure | None:
    if figure.of_responses:
        return figure if any(run.alignment for run in runs) else None
    series = tuple(s for s in figure.series if s[1] in there)
    views = {k: tuple(s for s in view if s[1] in there) for k, view in figure.views.items()}
    if not series and not any(views.values()):
        return None
    values = {f: getattr(figure, f) for f in ("note", "format", "zero", "rule", "wide", "kind")}
    return Figure(figure.key, figure.section, figure.title, series, views, **values)
