"""`prerl help` and the glossary of metrics: read from source, and held here against what is really there."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prerl_lightning import docstrings, manual
from prerl_lightning.docstrings import read
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.glossary import column, glossary

PACKAGE = Path(manual.__file__).parent
TOPICS = {name: path for of_kind in manual.topics().values() for name, path in of_kind.items()}


def show(capsys, *topic) -> str:
    manual.help(topic)
    return " ".join(capsys.readouterr().out.split())


def test_help_is_answered_without_what_is_heavy():
    code = (
        "import sys; from prerl_lightning.cli import main; main(['help', 'GRPO']); main(['help', 'data']); "
        "[main(['help', name]) for name in ('ProblemSet', 'Life', 'prerl_lightning.Watcher')]; "
        "assert not {'torch', 'lightning', 'vllm', 'transformers'} & set(sys.modules), 'heavy'"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "GRPO    model: {class_path: GRPO, init_args: {...}}" in found
    assert "  lr    float, default 1e-6\n      peak learning rate of this life" in found
    assert "  prompts_per_step    int, default 16\n      P over all ranks" in found


@pytest.mark.parametrize("topic", TOPICS)
def test_what_is_read_is_what_python_sees(topic):
    """Names, order of what is required, defaults, and a word on each."""
    found = manual.entry(TOPICS[topic])
    module, _, name = TOPICS[topic].rpartition(".")
    there = getattr(importlib.import_module(module), name)
    assert found.text or topic == "trainer"
    if not inspect.isclass(there):
        return
    seen: dict[str, inspect.Parameter] = {}
    for base in there.__mro__[:-1]:
        if maker := vars(base).get("__init__", vars(base).get("__new__")):
            parameters = inspect.signature(maker).parameters.values()
            kinds = {p.kind for p in parameters}
            seen |= {p.name: p for p in list(parameters)[1:] if p.name not in seen}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    seen = {n: p for n, p in seen.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    assert {a.name for a in found.arguments} == seen.keys()
    for argument in found.arguments:
        default = seen[argument.name].default
        assert argument.text or topic == "Prompt", argument
        assert argument.type, argument
        assert (argument.default is None) == (default is inspect.Parameter.empty), argument
        try:
            written = ast.literal_eval(argument.default or "None")
        except ValueError:  # a call or a lambda
            continue
        if topic != "trainer" and default is not inspect.Parameter.empty and "factory" not in repr(default):
            assert written == default, argument


def test_every_class_that_a_configuration_may_name_is_a_topic():
    from prerl_lightning.data.problems import ProblemSet
    from prerl_lightning.objectives import PolicyModule
    from prerl_lightning.objectives.advantages import Advantage
    from prerl_lightning.objectives.aggregations import Aggregation
    from prerl_lightning.objectives.coefficients import Coefficient
    from prerl_lightning.objectives.surrogates import Surrogate
    from prerl_lightning.objectives.token_weights import Weight
    from prerl_lightning.refusals import _below

    importlib.import_module("prerl_lightning.run")
    bases = (PolicyModule, ProblemSet, Advantage, Aggregation, Coefficient, Surrogate, Weight)
    classes = [kind for base in bases for kind in _below(base)]
    names = {kind.__name__ for kind in classes if kind.__module__.startswith("prerl_lightning.")}
    assert names - TOPICS.keys() <= {"DrawnProblems", "RowProblems", "Columns", "_Between"}  # bases


def test_help_in_words(capsys):
    found = show(capsys)
    assert all(name in found for name in (*TOPICS, *manual.VALUES, "metrics"))
    assert "init_args: {...}} GRPO's loss + pretrain_coefficient * a pre-train-space loss" in show(capsys, "MixedRL")
    assert "importance_sampling 'none' | 'token' | 'sequence-mask', default \"none\"" in show(capsys, "MixedRL")
    found = show(capsys, "data")
    assert "train ProblemSet, required the problems to train on." in found
    assert found.endswith("See also: prerl help data.sampling, data.val_sampling, data.format, data.verification.")
    assert "data.sampling: top_p float, default 1.0" in show(capsys, "top_p")
    assert "data.val_sampling: top_p float | None, default None" in show(capsys, "top_p")
    assert show(capsys, "data.sampling.group_size") == (
        "data.sampling: group_size int, default 8 G, responses a prompt."
    )
    assert "max_epochs Optional[int], default -1" in show(capsys, "trainer")  # ours, not Lightning's
    assert "class_path: prerl_lightning.rewards.DenyList" in show(capsys, "DenyList")
    assert "data.reward: prerl_lightning.rewards.boxed_reward" in show(capsys, "boxed_reward")
    assert show(capsys, "rollout/entropy").startswith("rollout/entropy nats a token Of the policy, estimated")
    assert "time/optimizer s Its steps." in show(capsys, "metrics")


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("rloo", "objectives/rloo --config configs/objectives/rloo.yaml Overlay, RLOO (arXiv 2402.14740)"),
        ("DAPO", "objectives/dapo --config configs/objectives/dapo.yaml Overlay, DAPO"),
        ("reinforce++", "objectives/reinforce_pp --config"),
        ("w-reinforce", "objectives/w_reinforce --config"),
        ("Dr. GRPO", "objectives/dr_grpo --config"),
        ("study/switch", "study/switch prerl study configs/study/switch.yaml"),
        ("grpo", "GRPO model: {class_path: GRPO, init_args: {...}}"),
        ("nsr-prerl", "NSRPreRL model: {class_path: NSRPreRL, init_args: {...}}"),
        (
            "Verification",
            "data.verification data.verification: {...}, in Python Verification(...) How rewards are computed.",
        ),
        ("fit", "usage: prerl fit [--config FILE ...]"),
        ("embedded", "all objectives: model str | None"),  # a value: of what
        ("k3", "all objectives: kl_estimator"),
        ("last", "Single values: ckpt_path"),
    ],
)
def test_a_topic_by_the_name_that_the_field_has(topic, said, capsys):
    assert said in show(capsys, topic)


def test_a_command_is_a_topic(capsys):
    with pytest.raises(SystemExit):
        manual.help(["runs"])
    assert "usage: prerl runs" in capsys.readouterr().out


def test_a_class_of_one_s_own(capsys, tmp_path, monkeypatch):
    """By its path, through whatever it is derived from, and without running its module."""
    (tmp_path / "mine.py").write_text(
        "import prerl_lightning.objectives as o\n"
        "class Mine(o.MixedRL):\n"
        '    """What it is.\n\n    Args:\n        beta: of mine.\n    """\n'
        "    def __init__(self, beta: float = 0.5, **kwargs):\n        super().__init__(**kwargs)\n"
        "class More(Mine):\n    pass\n"
        "def reward(prompt, response, ground_truth, extra):\n    '''A word.'''\n"
        "raise RuntimeError('not to be run')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("Mine", "More"):
        found = show(capsys, f"mine.{name}")
        assert f"model: {{class_path: mine.{name}, init_args: {{...}}}}" in found
        assert "beta float, default 0.5 of mine. pretrain_coefficient float, default 0.01" in found
        assert "kl_coefficient float, default 0.0 of a KL penalty" in found
    assert show(capsys, "mine.reward") == "mine.reward A word."


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from prerl_lightning import PolicyModule", "PolicyModule"),
        ("from prerl_lightning import PolicyModule as Base", "Base"),
        ("import prerl_lightning as prerl", "prerl.PolicyModule"),
        ("import prerl_lightning", "prerl_lightning.PolicyModule"),
        ("import prerl_lightning.objectives", "prerl_lightning.objectives.PolicyModule"),
        ("import prerl_lightning as prerl", "prerl.objectives.PolicyModule"),
        ("from prerl_lightning import objectives", "objectives.PolicyModule"),
        ("from prerl_lightning import objectives as o", "o.base.PolicyModule"),
    ],
)
def test_a_base_is_found_however_it_is_imported(imports, base, capsys, tmp_path, monkeypatch):
    """The lazy package's names too, which stand in its stub alone."""
    (tmp_path / "own.py").write_text(f"{imports}\n\n\nclass Mine({base}):\n    '''What it is.'''\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for of_a_module in (docstrings._file, docstrings._source, docstrings._imports, docstrings._definition):
        of_a_module.cache_clear()
    found = show(capsys, "own.Mine")
    assert found.startswith("own.Mine model: {class_path: own.Mine, init_args: {...}} What it is. model str | None")
    assert "could not be read" not in found


def test_the_objective_of_the_example(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE / "examples" / "own_task"))
    assert read("objective.DrGRPO").unread == ()
    assert "lr float, default 1e-6" in show(capsys, "objective.DrGRPO")


def test_every_name_of_a_lazy_package_is_found():
    stubs = list(PACKAGE.rglob("__init__.pyi"))
    assert len(stubs) > 5
    for stub in stubs:
        package = ".".join(stub.parent.relative_to(PACKAGE.parent).parts)
        for name in re.findall(r" as (\w+)$", stub.read_text(), re.M):
            there = getattr(importlib.import_module(package), name)
            found = read(f"{package}.{name}")
            assert found is not None, name
            assert found.home == f"{there.__module__}.{there.__qualname__}"


def test_a_topic_by_a_path_of_its_own(capsys):
    assert show(capsys, "prerl_lightning.Watcher") == show(capsys, "Watcher")
    assert show(capsys, "prerl_lightning.callbacks.watcher.Watcher") == show(capsys, "Watcher")
    assert show(capsys, "prerl_lightning.Sampling") == show(capsys, "data.sampling")
    assert show(capsys, "prerl_lightning.GRPO") == show(capsys, "GRPO")
    assert show(capsys, "Life") == show(capsys, "prerl_lightning.Life") == show(capsys, "PolicyReincarnation")
    assert show(capsys, "load_run").startswith("load_run ")  # what one imports is a topic, listed or not


def test_what_code_of_one_s_own_derives_from_or_is_handed(capsys):
    found = show(capsys, "ProblemSet")
    assert found.startswith("ProblemSet from prerl_lightning import ProblemSet A sized, indexable set of problems.")
    assert "to write __len__() -> int to write __getitem__(index: int) -> Problem may be written reward: " in found
    assert found.endswith("may be written load() -> None Open the source and check it.")
    assert "__iter__" not in found  # there already
    found = show(capsys, "Problem")
    assert "row int, required the row's number in its source" in found
    assert "extra Mapping[str, Any], default {} any further columns" in found
    found = show(capsys, "Watcher")
    assert "to write watch(trainer: L.Trainer, module: PolicyModule) -> dict[str, float] Metrics of the step" in found
    assert "on_train_batch_end" not in found
    found = show(capsys, "Engine")
    assert "to write update_weights(named_weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None" in found
    assert "may be written sizes(shape: ModelShape, config: PretrainedConfig, total: int | None) -> EngineSize" in found
    found = show(capsys, "Rollout")
    assert "lengths Tensor, required (N,) int64, tokens of each response." in found
    assert "property responses: tuple[Response, ...] One by one, as views." in found
    assert "method losses(loss: Tensor" in show(capsys, "Tokens")
    assert "token_ids tuple[int, ...], required" in show(capsys, "Prompt")
    assert "truncated bool, required the length limit ended it." in show(capsys, "Response")
    found = show(capsys, "Score")
    assert "answer str | None, default None as compared with the ground truth" in found
    assert "could not be read" not in found  # float
    assert "lr float, default 1e-6" in show(capsys, "PolicyModule")
    assert "from prerl_lightning.objectives.advantages import Advantage" in show(capsys, "Advantage")
    assert "to write" not in show(capsys, "Files") + show(capsys, "VLLMEngine")


def test_the_methods_of_a_base_are_those_that_it_has_abstract_and_those_that_do_nothing(tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(
        "class Judge:\n"
        "    def score(self, text: str) -> float:\n        '''A number.'''\n        raise NotImplementedError\n"
        "    def close(self):\n        '''Let go.'''\n"
        "    def limit(self, n: int = 3) -> 'int':\n        '''Of all.'''\n        return LIMIT\n"
        "    def twice(self, n):\n        '''Uses its argument.'''\n        return 2 * n\n"
        "    def run(self):\n        '''Does something.'''\n        print()\n"
        "class Mine(Judge):\n"
        "    def close(self):\n        '''Nothing to close.'''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [(method.how, method.called) for method in read("judges.Judge").methods]
    assert found == [
        ("to write", "score(text: str) -> float"),
        ("may be written", "close()"),
        ("may be written", "limit(n: int=3) -> int"),
    ]
    assert read("judges.Mine").methods == ()


def test_a_key_s_name_is_the_key_and_not_the_class_of_this_name(capsys):
    for name, said in {"engine": "data: engine Engine | None", "prompt": "Files: prompt str, default"}.items():
        assert show(capsys, name).startswith(said)
    assert show(capsys, "rollout").startswith("Rollout from prerl_lightning")


def test_a_function_s_arguments_are_said(capsys):
    found = show(capsys, "prerl_lightning.evaluate")
    assert "Args: - model: Hugging Face folder or hub id" in found


def test_two_modules_that_import_a_name_from_each_other_have_none(tmp_path, monkeypatch):
    (tmp_path / "ping.py").write_text("from pong import Thing\n")
    (tmp_path / "pong.py").write_text("from ping import Thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read("ping.Thing") is None


def test_the_documentation_has_them_beside_what_they_belong_to():
    assert "## ProblemSet\n\n`from prerl_lightning import ProblemSet`" in manual.page("problems")
    assert "`__len__() -> int` (to write)\n" in manual.page("problems")
    assert "## Watcher" in manual.page("callbacks")
    assert "## Engine" in manual.page("engines")
    assert "## Score" in manual.page("rewards")


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        (["GRPP"], "GRPP: no such topic. Did you mean GRPO?"),
        (["evaluat"], "evaluat: no such topic. Did you mean evaluate?"),
        (["reinforce_p"], "reinforce_p: no such topic. Did you mean reinforce_pp?"),
        (["data.samplng"], "no class or function of this path is found from here. Did you mean data.sampling?"),
        (["nowhere.Thing"], "nowhere.Thing: no class or function of this path"),
        (["prerl_lightning.objectives.Nothing"], "no class or function of this path"),
        (["GRPO", "data"], "unrecognized arguments: data"),
    ],
)
def test_what_is_no_topic_is_refused(topic, said):
    with pytest.raises(InputError, match=re.escape(said)):
        manual.help(topic)


def test_a_base_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "far.py").write_text("from not_there import Base\nclass Far(Base):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read("far.Far").unread == ("Base",)


# ---------------------------------------------------------------------- metrics


def test_columns_are_found_by_their_names():
    same = {
        "val/avg@8": ["val/avg@8/low", "test/avg@4", "val/aime24/avg@8/high", "test/aime24/avg@8"],
        "val/thoughts/wait_ratio/low": ["val/thoughts/seal/reflection_ratio/high"],
        "thoughts/wait_per_1k": ["thoughts/seal/transition_per_1k", "val/thoughts/wait_per_1k"],
        "alignment/position/1_of_4": ["alignment/position/4_of_4"],
    }
    for name, others in same.items():
        assert column(name) is not None
        assert all(column(other) is column(name) for other in others), name
    assert column("val/what") is column("rollout/entropies") is None


def test_a_switched_on_column_is_one_that_the_code_names():
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "glossary.py")
    for _, columns in glossary().values():
        for each in columns:
            last = each.name.split("/{")[0].rpartition("/")[2] if each.when else ""
            assert last in source
            assert not each.when or manual._about(each.when.removeprefix("model.init_args."))


def test_the_report_says_what_a_figure_s_columns_are():
    from prerl_lightning.report.figures import Figure
    from prerl_lightning.report.html import figure

    shown = figure(Figure("entropy", "health", "Entropy", (("", "rollout/entropy"),)))
    assert f"rollout/entropy: {column('rollout/entropy').text} (nats a token)" in shown
