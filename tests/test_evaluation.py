"""The measures against closed forms and exact enumeration; ranks against one."""

from itertools import combinations

import pytest
import torch
from forked import context

from prerl_lightning.metrics.evaluation import answer_number, bootstrap, majority, pass_at_k, per_problem
from prerl_lightning.metrics.held_out import EvaluationMetric
from prerl_lightning.rewards.pool import Verdict
from prerl_lightning.rollout.sampler import Group
from prerl_lightning.types import Prompt, Response


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for correct in range(n + 1):
        samples = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            draws = [any(d) for d in combinations(samples, k)]
            assert pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        ("AAB", [1, 1, 0], 1),
        ("ABB", [1, 0, 0], 0),
        ("AB", [1, 0], 0.5),  # a tie: either is as likely
        ("AABBC", [1, 1, 0, 0, 0], 0.5),
        ("A---", [1, 0, 0, 0], 1),  # no answer does not vote
        ("----", [0, 0, 0, 0], 0),
        ("AA", [1, 0], 0.5),  # two rewards for one answer
    ],
)
def test_majority(answers, rewards, expected):
    assert majority(rewards, [0 if a == "-" else answer_number(a) for a in answers]) == expected


def test_the_measures_of_a_matrix():
    rewards = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    answers = torch.tensor([[1, 1, 2, 3], [4, 4, 5, 0], [6, 6, 6, 6]])
    found = {k: v.tolist() for k, v in per_problem(rewards, answers).items()}
    assert found["avg@4"] == found["pass@1"] == [0.5, 0, 1]
    assert found["pass@2"] == pytest.approx([1 - 1 / 6, 0, 1])
    assert found["pass@4"] == [1, 0, 1]
    assert found["maj@4"] == [1, 0, 1]
    assert "maj@4" not in per_problem(rewards, torch.zeros_like(answers))
    assert list(per_problem(rewards[:, :3], answers[:, :3])) == ["avg@3", "pass@1", "pass@2", "pass@3", "maj@3"]


def test_the_bootstrap_has_the_mean_s_own_variance():
    """Of P independent coin flips: p (1 - p) / P exactly, which ratios of counts are resampled by."""
    values = torch.tensor([1.0] * 60 + [0.0] * 140, dtype=torch.float64)
    deviation = (0.3 * 0.7 / 200) ** 0.5
    assert float(bootstrap(values).std()) == pytest.approx(deviation, rel=0.05)


def groups(rows, k=4):
    """A deterministic group for each row."""
    made = []
    for row in rows:
        generator = torch.Generator().manual_seed(row)
        right = torch.randint(0, 2, (k,), generator=generator).tolist()
        made.append(
            Group(
                Prompt(row, (1,), "", ""),
                tuple(Response((1,) * (row % 5 + j + 1), (), "", j == 0) for j in range(k)),
                tuple(Verdict(float(r), None if j == 3 else f"a{r}") for j, r in enumerate(right)),
            )
        )
    return made


def test_order_and_batches_change_no_digit():
    whole, parts = EvaluationMetric(), EvaluationMetric()
    whole.update(groups(range(30)), groups(range(30), 1), 4)
    for rows in (range(20, 30), [], range(10), range(10, 20)):
        parts.update(groups(rows), groups(rows, 1), 4)
    found = whole.compute()
    assert found == parts.compute()
    assert found["avg@4/low"] < found["avg@4"] < found["avg@4/high"]
    assert found["truncated"] == found["no_answer"] == 0.25
    assert {"greedy", "maj@4", "pass@2", "length"} <= set(found)
    empty = EvaluationMetric()
    empty.update([], [], 4)
    assert empty.compute() == {}


def test_order_changes_no_digit_of_any_interval():
    """Rewards that are all different: the resampled means are of the same problems in the same places."""

    def scored(row, k):
        verdicts = tuple(Verdict(((row * 37 + j * 11) % 101) / 101, None) for j in range(k))
        return Group(Prompt(row, (1,), "", ""), (Response((1,), (), "", False),) * k, verdicts)

    def found(rows):
        metric = EvaluationMetric()
        metric.update([scored(r, 2) for r in rows], [scored(r, 1) for r in rows], 2)
        return metric.compute()

    assert found(range(9)) == found((4, 0, 8, 2, 6, 1, 3, 7, 5))
    assert found(range(9))["greedy"] == pytest.approx(sum((r * 37) % 101 for r in range(9)) / 101 / 9)


def _rank(rank, path, queue):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    metric = EvaluationMetric()
    rows = [range(0, 30, 2), range(1, 5, 2)][rank]  # uneven
    metric.update(groups(rows), groups(rows, 1), 4)
    queue.put(metric.compute())
    alone = EvaluationMetric()  # a rank without a problem
    alone.update(groups(rows if rank else []), groups(rows if rank else [], 1), 4)
    queue.put(alone.compute())
    dist.destroy_process_group()


def test_one_rank_is_two_ranks(tmp_path):
    queue = context().Queue()
    processes = [context().Process(target=_rank, args=(r, tmp_path / "store", queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in range(4)]
    for process in processes:
        process.join()
    rows = [*range(0, 30, 2), *range(1, 5, 2)]
    for rows_ in (rows, range(1, 5, 2)):
        one = EvaluationMetric()
        one.update(groups(rows_), groups(rows_, 1), 4)
        assert found.count(one.compute()) == 2
