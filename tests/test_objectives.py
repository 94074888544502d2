"""The axes of a term: every configuration in configs/objectives against plain loops in fp64, loss and gradient.

The policy is a real GPT-2 of one layer in fp64, which has no fp32 inside as RMSNorm and rotary embeddings have, and the
whole of `Update` runs on it: selection, old log-probs, micro-batches, head. The expected losses are written out here,
from the papers' formulas, and share no code with the package.
"""

import math
import re
from argparse import ArgumentError
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from test_step import alternating_reward, fit, sgd, weights
from trainers import quiet_trainer
from transformers import GPT2Config, GPT2LMHeadModel

from prerl_lightning import refusals
from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.errors import InputError, said_by_us
from prerl_lightning.objectives import GRPO, Objective, PolicyModule, checks, lives
from prerl_lightning.objectives import advantages as adv
from prerl_lightning.objectives.coefficients import Cosine, Exponential, Linear
from prerl_lightning.objectives.entropy import TargetEntropy
from prerl_lightning.objectives.surrogates import CISPO, DPPO, GSPO, SAPO, PolicyGradient, PPOClip, Tokens
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.token_weights import BySign, Confidence
from prerl_lightning.policy.model import Policy
from prerl_lightning.settings import described

CONFIGS = {p.stem: p for p in sorted((Path(__file__).parents[1] / "configs" / "objectives").glob("*.yaml"))}
OTHER = {"post-train": "pre-train", "pre-train": "post-train"}
STEP = 5  # of the life
PREFIX = 1
STATE = 0.03  # of an adaptive entropy coefficient


@pytest.fixture(scope="module")
def parse():
    """A function from `model` as in a configuration to the objective, made as the command line makes it; and its
    configuration back."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PolicyModule, "model")

    def parsed(model):
        found = parser.parse_object({"model": model})
        return parser.instantiate_classes(found).model, yaml.safe_load(parser.dump(found))["model"]

    return parsed


def small_lm():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=30, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2,
    )).double().eval()  # fmt: skip


def move(lm, by=0.12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=torch.float64))


class Case:
    """What the expected losses are made of: of each response by number, in plain Python but for log-probs.

    ``r``, ``g``, ``cut``, ``engine``: log-probs; ``new[space][i]`` and ``old[space][i]``: (T_i,) log-probs;
    ``h[space][i]``: (T_i,) entropies; ``batch``: the numbers in the minibatch."""

    def __init__(self, rollout, lm, old_lm, batch):
        self.r, self.g, self.cut = rollout.rewards.tolist(), rollout.group_ids.tolist(), rollout.truncated.tolist()
        self.engine = [response.log_probs.tolist() for response in rollout.responses]
        self.batch, self.n = batch, range(len(rollout))
        self.new, self.old, self.h = {}, {}, {}
        for space in OTHER:
            both = [self.forward(rollout, lm, space, i) for i in self.n]
            self.new[space], self.h[space] = [a for a, _ in both], [b for _, b in both]
            with torch.no_grad():
                self.old[space] = [self.forward(rollout, old_lm, space, i)[0] for i in self.n]

    def forward(self, rollout, lm, space, i):
        context = [PREFIX] if space == "pre-train" else list(rollout.prompts[self.g[i]].token_ids)
        ids = torch.tensor([*context, *rollout.responses[i].token_ids.tolist()])
        log_p = (lm(ids[None]).logits[0, len(context) - 1 : -1] / rollout.temperature).log_softmax(-1)
        return log_p.gather(1, ids[len(context) :, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def group(self, i):
        return [self.r[j] for j in self.n if self.g[j] == self.g[i]]

    def centred(self, i):
        return self.r[i] - mean(self.group(i))

    def grpo(self, i):
        return self.centred(i) / (stdev(self.group(i)) + 1e-6)

    def signed(self, i, positive=1.0):
        return positive if self.r[i] >= 1 else -1.0


def ppo(new, old, a, low=0.2, high=0.2, dual=10.0):
    """Summed over a response's tokens."""
    ratio = (new - old).exp()
    worst = torch.minimum(a * ratio, a * ratio.clamp(1 - low, 1 + high))
    return -(worst.clamp(min=dual * a) if a < 0 else worst).sum()


def token_mean(c, space, advantage, numbers=None, token=ppo):
    numbers = c.batch if numbers is None else numbers
    tokens = sum(len(c.new[space][i]) for i in numbers)
    return sum(token(c.new[space][i], c.old[space][i], advantage(i)) for i in numbers) / tokens


def dr_grpo(c, s):
    return sum(ppo(c.new[s][i], c.old[s][i], c.centred(i)) for i in c.batch) / (128 * len(c.batch))


def dapo(c, s):
    numbers = [i for i in c.batch if not c.cut[i] and len(set(c.group(i))) > 1]
    assert 0 < len(numbers) < len(c.batch)
    return token_mean(c, s, c.grpo, numbers, lambda new, old, a: ppo(new, old, a, high=0.28))


def rloo(c, s):
    total = 0.0
    for i in c.batch:
        others = [c.r[j] for j in c.n if c.g[j] == c.g[i] and j != i]
        total = total - (c.r[i] - mean(others)) * c.new[s][i].sum()
    return total / len(c.batch)


def reinforce_pp(c, s):
    return token_mean(c, s, lambda i: (c.r[i] - mean(c.r)) / (stdev(c.r) + 1e-6))


def reinforce_pp_baseline(c, s):
    spread = stdev([c.centred(j) for j in c.n]) + 1e-6
    return token_mean(c, s, lambda i: c.centred(i) / spread)


def w_reinforce(c, s):
    return token_mean(c, s, lambda i: c.signed(i, 0.1))


def nsr(c, s):
    return token_mean(c, s, c.signed, [i for i in c.batch if c.r[i] < 1])


def a_nsr(c, s):
    decayed = 1.0 - 0.8 * STEP / 50
    return decayed * nsr(c, s) + 0.1 * token_mean(c, s, c.signed, [i for i in c.batch if c.r[i] >= 1])


def cw_nsr(c, s):
    tokens = sum(len(c.new[s][i]) for i in c.batch)
    total = 0.0
    for i in c.batch:
        weight = 1.0 if c.r[i] >= 1 else math.exp(mean(c.old[s][i].tolist()))
        total = total + weight * ppo(c.new[s][i], c.old[s][i], c.signed(i, 0.1))
    return total / tokens


def lens(c, s):
    def advantage(i):
        group = [j for j in c.n if c.g[j] == c.g[i]]
        sure = {j: math.exp(mean(c.engine[j])) for j in group}
        difficulty = 2 * max(sure.values())
        if right := [j for j in group if c.r[j] == 1]:
            difficulty = max(difficulty, 1 / (sum(1 / sure[j] for j in right) / len(group)))
        reward = {j: 1.0 if j in right else -sure[j] / (difficulty - sure[j]) / len(group) for j in group}
        centred = reward[i] - mean(reward.values())
        if len(right) == len(group):
            return 0.0
        return centred / (stdev(reward.values()) + 1e-6) if right else 0.25 * centred

    assert any(advantage(i) for i in c.batch if not any(c.group(i)))  # an all-wrong group teaches
    return token_mean(c, s, advantage)


def gspo(c, s):
    total = 0.0
    for i in c.batch:
        new, old = c.new[s][i], c.old[s][i]
        ratio = ((new.sum() - old.sum()) / len(new)).exp()
        value, a = ratio.item(), c.grpo(i)
        inside = min(max(value, 1 - 3e-4), 1 + 4e-4)
        total = total - (a * ratio if a * value <= a * inside else a * inside)
    return total / len(c.batch)


def cispo(c, s):
    def token(new, old, a):
        return -((new.detach() - old).exp().clamp(max=5.0) * a * new).sum()

    return token_mean(c, s, c.grpo, token=token)


def sapo(c, s):
    total = 0.0
    for i in c.batch:
        a, new, old = c.grpo(i), c.new[s][i], c.old[s][i]
        tau = 1.0 if a > 0 else 1.05
        gate = 4 / tau / (1 + (-tau * ((new - old).exp() - 1)).exp())
        total = total - a * gate.mean()
    return total / len(c.batch)


def dppo(c, s):
    def token(new, old, a):
        total = 0.0
        for log_p, log_q in zip(new, old, strict=True):
            p, q = math.exp(log_p.item()), math.exp(log_q.item())
            if not (p - q > 0.2 if a > 0 else q - p > 0.2):
                total = total - min(p / q, 20.0) * a * log_p
        return total

    return token_mean(c, s, c.grpo, token=token)


def entropy_control(c, s):
    tokens = sum(len(c.new[s][i]) for i in c.batch)
    return token_mean(c, s, c.grpo) - STATE * sum(c.h[s][i].sum() for i in c.batch) / tokens


def soft_switch(c, s):
    away = 1 - STEP / 20
    negatives = [i for i in c.batch if c.centred(i) < 0]
    return away * token_mean(c, s, c.centred, negatives) + (1 - away) * token_mean(c, OTHER[s], c.grpo)


EXPECTED = {
    f.__name__: f
    for f in (
        *(dr_grpo, dapo, rloo, reinforce_pp, reinforce_pp_baseline, w_reinforce, nsr, a_nsr, cw_nsr, lens, gspo),
        *(cispo, sapo, dppo, entropy_control, soft_switch),
    )
}


@pytest.fixture(scope="module")
def rollout(make_rollout):
    """Five groups of four, mixed, all wrong, all right, mixed, and one outside the minibatch; some truncated."""
    rewards = [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1]
    made = make_rollout(5, 4, rewards=rewards)
    # the engine's: only LENS and the estimate of the entropy look at them
    log_probs = -0.02 - (torch.arange(len(made.log_probs)) % 7).to(made.log_probs) / 40
    return replace(made, log_probs=log_probs, truncated=torch.arange(20) % 5 == 1)


@pytest.fixture(scope="module")
def case(rollout):
    """The rollout's, with the weights that sampled and those of a later minibatch."""
    old_lm, lm = small_lm(), small_lm()
    move(lm)
    return Case(rollout, lm, old_lm, [i for i in range(20) if i < 16]), lm


def run(module, rollout, batch):
    """Loss and gradient of one minibatch after the weights have moved since sampling, through `Update`."""
    module.policy, module.prefix_id = Policy(small_lm()), PREFIX
    update = module.make_update(rollout, life_step=STEP)
    works = [update.work(term) for term in module.terms]
    move(module.policy.model)
    inside = torch.zeros(len(rollout), dtype=torch.bool)
    inside[batch] = True
    update.backward(works, inside, on_policy=False)
    gradient = torch.cat([p.grad.flatten() for p in module.policy.model.parameters()])
    return update.sums.reduced(), gradient


def exact(loss, lm):
    gradient = torch.autograd.grad(loss, list(lm.parameters()), retain_graph=True)
    return loss.item(), torch.cat([g.flatten() for g in gradient])


def agree(found, gradient, expected):
    loss, should = expected
    assert found["optim/loss"] == pytest.approx(loss, rel=1e-9)
    assert float(should.norm()) > 1e-3
    assert float((gradient - should).norm() / should.norm()) < 1e-9


def test_each_configuration_has_its_expectation():
    assert CONFIGS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("swapped", [False, True], ids=["as it is", "in the other space"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_objective_is_its_formula(parse, rollout, case, name, swapped):
    case, lm = case
    model = yaml.safe_load(CONFIGS[name].read_text())["model"]
    spaces = [term["space"] for term in model["init_args"]["terms"]]
    if swapped:
        for term in model["init_args"]["terms"]:
            term["space"] = OTHER[term["space"]]
    model["init_args"] |= {"epochs": 2, "minibatches": 1, "micro_batch_size": 3}
    module, again = parse(model)
    module.entropy_state = STATE
    found, gradient = run(module, rollout, case.batch)
    space = OTHER[spaces[0]] if swapped else spaces[0]
    agree(found, gradient, exact(EXPECTED[name](case, space), lm))
    assert (found["optim/clipped"] > 0) == (name not in ("rloo", "sapo"))  # so that ratios are beyond all bounds
    # what is written down for a resume makes the same objective, from YAML and from Python
    plain = {name: described(module)["init_args"][name] for name in ("terms", "entropy_coefficient")}
    for model in (again, {"class_path": "Objective", "init_args": plain}):
        same = parse(model)[0]
        assert (same.terms, same.loss.entropy_coefficient) == (module.terms, module.loss.entropy_coefficient)


def test_objectives_of_terms_are_told_apart(parse):
    """By their names, or by what their terms choose. A checkpoint has the class: an older one, without names, fits."""
    shipped = [yaml.safe_load(file.read_text())["model"] for file in CONFIGS.values()]
    names = [model["init_args"]["name"] for model in shipped]
    assert {"RLOO", "DAPO", "REINFORCE++", "Dr. GRPO"} < set(names)
    assert len(set(names)) == len(names)
    assert parse(shipped[0])[0].title == names[0]
    first = Objective([Term("pre-train", adv.GroupMean(), "negative"), Term("post-train")])
    second = Objective([Term("post-train", adv.LeaveOneOut(), surrogate=PolicyGradient())])
    lives.arrange([first, second], [0, 3])
    first.planned_lives = first.lives
    assert first.lives == [("pre-train GroupMean negative + GroupStd", 0), ("LeaveOneOut PolicyGradient", 3)]
    assert lives.state(first)["schedule"] == [["Objective", 0], ["Objective", 3]]
    lives.resume(first, lives.state(first))
    assert described(Objective([Term("post-train")], name="mine"))["init_args"]["name"] == "mine"
    with pytest.raises(InputError, match=r"Objective\.name: 'a/b': a name is up to 60 letters"):
        Objective([Term("post-train")], name="a/b")


# ---------------------------------------------------------------------- KL and entropy


def reference_case(rollout):
    """The expected loss where the policy that samples is the moved one and the reference the one before: on-policy."""
    lm = small_lm()
    move(lm)
    return Case(rollout, lm, small_lm(), list(range(16))), lm  # its `old` are the reference's


def on_policy(module, rollout, batch):
    module.policy, module.prefix_id = module.policy or Policy(small_lm()), PREFIX
    if module.loss.kl_coefficient:
        module.anchored_reference()
    move(module.policy.model)
    update = module.make_update(rollout)
    works = [update.work(term) for term in module.terms]
    inside = torch.zeros(len(rollout), dtype=torch.bool)
    inside[batch] = True
    update.backward(works, inside, on_policy=True)
    gradient = torch.cat([p.grad.flatten() for p in module.policy.model.parameters()])
    return update.sums.reduced(), gradient


@pytest.mark.parametrize("space", OTHER)
def test_the_kl_in_the_reward_comes_before_any_baseline(rollout, space):
    """A_i of r_i - 0.3 sum_t (log p - log q), in the space of the first term, for both terms: also in groups whose
    rewards are all equal."""
    terms = [Term(space, adv.LeaveOneOut()), Term(OTHER[space], adv.GroupMean(), "positive", coefficient=0.5)]
    module = Objective(terms, kl_coefficient=0.3, kl_in="reward")
    c, lm = reference_case(rollout)
    apart = [float((c.new[space][i] - c.old[space][i]).sum().detach()) for i in c.n]
    c.r = [c.r[i] - 0.3 * apart[i] for i in c.n]
    expected = 0.0
    for at, coefficient, numbers in (
        (space, 4 / 3, c.batch),
        (OTHER[space], 0.5, [i for i in c.batch if c.centred(i) > 0]),
    ):
        tokens = sum(len(c.new[at][i]) for i in numbers)
        total = sum(c.centred(i) * c.new[at][i].sum() for i in numbers)
        expected = expected - coefficient * total / tokens
    found, gradient = on_policy(module, rollout, c.batch)
    should = exact(expected, lm)[1]
    assert float((gradient - should).norm() / should.norm()) < 1e-9
    tokens = sum(len(c.new[space][i]) for i in c.n)
    assert found["optim/reference_kl"] == pytest.approx(sum(apart) / tokens, rel=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_by_each_estimator(rollout, estimator):
    module = Objective([Term("post-train")], kl_coefficient=0.3, kl_estimator=estimator)
    c, lm = reference_case(rollout)
    total = 0.0
    for i in c.batch:
        p, q = c.new["post-train"][i], c.old["post-train"][i]
        of = {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": (q - p).exp() - 1 - (q - p)}
        # on-policy the ratio has the value 1 and the gradient of log p
        total = total + (0.3 * of[estimator] - c.grpo(i) * (1 + p - p.detach())).sum()
    expected = total / sum(len(c.new["post-train"][i]) for i in c.batch)
    agree(*on_policy(module, rollout, c.batch), exact(expected, lm))


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("space", OTHER)
def test_a_bonus_for_entropy_is_over_all_that_the_first_term_counts(rollout, space, chunked):
    """In the first term's space alone, and whatever its coefficient and its advantages are."""
    terms = [Term(space, coefficient=0.0), Term(OTHER[space], adv.GroupMean())]
    module = Objective(terms, entropy_coefficient=0.2)
    c, lm = reference_case(rollout)
    tokens = sum(len(c.h[space][i]) for i in c.batch)
    other = sum((c.centred(i) * (1 + p - p.detach())).sum() for i in c.batch for p in [c.new[OTHER[space]][i]])
    expected = (-0.2 * sum(c.h[space][i].sum() for i in c.batch) - other) / tokens
    module.policy = Policy(small_lm(), chunked)
    found, gradient = on_policy(module, rollout, c.batch)
    agree(found, gradient, exact(expected, lm))
    if space == "post-train":
        mean_entropy = sum(c.h[space][i].sum().item() for i in c.batch) / tokens
        assert found["optim/entropy"] == pytest.approx(mean_entropy, rel=1e-9)
    else:
        assert "optim/entropy" not in found


def test_a_target_entropy_s_coefficient():
    control = TargetEntropy(0.5, step=0.1, most=0.25)
    seen, coefficient = [], 0.0
    for entropy in (0.9, 0.4, 0.5, 0.3, 0.3, 0.6, 0.3):
        seen.append(round(control.applied(coefficient, entropy), 9))
        coefficient = control.following(coefficient, entropy)
    assert seen == [0, 0, 0.1, 0.2, 0.25, 0, 0.15]


# ---------------------------------------------------------------------- single axes


def test_advantages_that_are_none_are_none_exactly():
    """Rewards whose float mean misses them; groups of one; and the batch as one group."""
    same, groups = torch.full((6,), 0.1, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    for advantage in (adv.GroupStd(), adv.GroupMean(), adv.LeaveOneOut(), adv.BatchStd(), adv.BatchStd(True)):
        assert not advantage(same, groups).any(), advantage
    alone = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert adv.LeaveOneOut()(alone, torch.tensor([3, 1])).tolist() == [0.5, 2.0]
    assert adv.ConstantBaseline(0.5)(alone, torch.tensor([0, 0])).tolist() == [0, 1.5]
    scores = torch.tensor([1.0, 0.5, 1 - 1e-9, 0], dtype=torch.float64)
    assert adv.SignedReward(0.1)(scores, groups[:4]).tolist() == [0.1, -1, 0.1, -1]


def test_which_terms_need_groups():
    need = {adv.GroupStd(), adv.GroupMean(), adv.LeaveOneOut(), adv.BatchStd(less_group_mean=True), None}
    free = {adv.BatchStd(), adv.SignedReward(), adv.ConstantBaseline()}
    assert {of for of in need | free if Term("post-train", of).of_groups} == need


def test_all_surrogates_have_one_gradient_at_the_first_update():
    advantages = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5, -2.0], dtype=torch.float64)
    response, lengths = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([3, 2, 1])
    for surrogate in (PPOClip(), CISPO(), SAPO(), DPPO(), PolicyGradient(), GSPO()):
        log_probs = torch.linspace(-3, -0.1, 6, dtype=torch.float64).requires_grad_()
        found = surrogate(Tokens(log_probs, log_probs.detach(), advantages, response, lengths))
        # GSPO's tokens share their response's ratio: each has 1 / length of it from each
        found.loss.sum().backward()
        torch.testing.assert_close(log_probs.grad, -advantages, rtol=1e-12, atol=0)
        assert not found.clipped.any()
        assert not found.dual_clipped.any()


def test_weights():
    old = torch.tensor([0.5, 0.5, 0.2, 0.8], dtype=torch.float64).log()
    advantages, response = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    tokens = Tokens(old + 1, old, advantages, response, torch.tensor([2, 2]))
    torch.testing.assert_close(BySign(2.0, 0.5)(tokens), torch.tensor([2, 2, 0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(Confidence(2.0)(tokens), torch.tensor([1, 1, 0.16, 0.16], dtype=torch.float64))


def of_position(tokens):
    """A weight of the user's: no type says what it gives."""
    return torch.arange(len(tokens.response)) % 2 * 1.0


def test_a_weight_by_its_import_path(parse, rollout, case):
    case, lm = case
    terms = [{"space": "post-train", "weight": f"{__name__}.of_position", "normalisation": "mean"}]
    module, _ = parse({"class_path": "Objective", "init_args": {"terms": terms, "epochs": 2, "micro_batch_size": 1}})

    def token(new, old, a):
        return ppo(new[1::2], old[1::2], a)

    agree(*run(module, rollout, case.batch), exact(token_mean(case, "post-train", case.centred, token=token), lm))


def test_coefficients():
    assert [Linear(1.0, 0.2, 4)(s) for s in (0, 1, 2, 4, 9)] == pytest.approx([1, 0.8, 0.6, 0.2, 0.2])
    assert [Cosine(1.0, 0.0, 4)(s) for s in (0, 1, 2, 4, 9)] == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, 0, 0])
    assert [Exponential(1.0, 0.2, 3)(s) for s in (0, 3, 6)] == pytest.approx([1, 0.6, 0.4])
    assert Linear(1.0, 0.0, 4)(4) == 0.0 == Cosine(0.0, 1.0, 4)(0)  # exactly: nothing is forwarded then


def test_what_is_multiplied_by_nothing_is_not_forwarded(rollout):
    """Of a switch between spaces one term at either end; a penalty is forwarded all the same."""
    for step, alive in ((0, [True, False]), (1, [True, True]), (2, [False, True])):
        module = Objective([
            Term("pre-train", adv.GroupMean(), "negative", coefficient=Linear(1.0, 0.0, 2)),
            Term("post-train", coefficient=Linear(0.0, 1.0, 2)),
        ])  # fmt: skip
        module.policy, module.prefix_id = Policy(small_lm()), PREFIX
        update = module.make_update(rollout, life_step=step)
        assert [bool(update.work(term).selected.any()) for term in module.terms] == alive


# ---------------------------------------------------------------------- runs


def test_schedules_count_the_steps_of_their_life_and_resume_exactly(model_folder, tmp_path):
    """The second life's coefficient is 0 from its third step on, which changes nothing; its bonus goes on growing. A
    run resumed in the middle has the same weights and the same state."""

    def lives():
        falling = Linear(1.0, 0.0, 2)
        first = GRPO(model=model_folder("llama-untied"), optimizer=sgd, lr=0.1)
        control = TargetEntropy(100.0, step=0.5, most=0.75)
        second = Objective(
            [Term("post-train", coefficient=falling)], optimizer=sgd, lr=0.1, entropy_coefficient=control
        )
        return first, second

    def go(steps, ckpt_path=None):
        first, second = lives()
        found = []

        class Notes(PolicyReincarnation):
            def on_train_batch_end(self, trainer, *_):
                found.append(float(trainer.callback_metrics.get("optim/entropy_coefficient", 0.0)))

        callbacks = [Notes(1, second)]
        trainer = fit(first, steps, ckpt_path, callbacks=callbacks)
        return first, second, trainer, found

    first, second, _, found = go(5)
    assert found == [0, 0, 0.5, 0.75, 0.75]
    assert second.entropy_state == 0.75
    go(3)[2].save_checkpoint(tmp_path / "third.ckpt")
    again, successor, _, rest = go(5, tmp_path / "third.ckpt")
    assert rest == found[3:]
    assert successor.entropy_state == 0.75
    assert torch.equal(weights(again), weights(first))
    plain = Objective([Term("post-train", coefficient=Linear(1.0, 0.0, 2))], optimizer=sgd, lr=0.1)
    noted = []

    class Skips(PolicyReincarnation):
        def on_train_batch_end(self, trainer, *_):
            noted.append(int(trainer.callback_metrics["optim/skipped"]))

    fit(lives()[0], 5, callbacks=[Skips(1, plain)])
    assert noted == [0, 0, 0, 1, 1]


def test_a_group_of_one_is_refused_where_a_group_is_compared(model_folder):
    from plain_engine import PlainEngine

    from prerl_lightning.data.module import RolloutDataModule
    from prerl_lightning.data.tasks.sums import ArithmeticProblems
    from prerl_lightning.rewards.shaping import LengthPenalty, WeightedSum
    from prerl_lightning.rollout.engine import Sampling

    data = RolloutDataModule(
        train=ArithmeticProblems("train", 8),
        reward=alternating_reward,
        sampling=Sampling(group_size=1),
        engine=PlainEngine(),
    )
    trainer = quiet_trainer(max_steps=1)
    checks.check_run(Objective([Term("post-train", adv.BatchStd())]), data, trainer)
    with pytest.raises(InputError, match=r"group_size: 1\."):
        checks.check_run(Objective([Term("post-train", adv.BatchStd()), Term("pre-train")]), data, trainer)
    module = Objective([Term("post-train", adv.SignedReward())], kl_coefficient=0.1, kl_in="reward")
    with pytest.raises(InputError, match="kl_in: reward, while"):
        checks.check_run(module, data, trainer)
    data.reward = WeightedSum([alternating_reward, LengthPenalty(1000)], [1.0, 0.1])
    with pytest.raises(InputError, match=r"data\.reward: a term's SignedReward .* LengthPenalty takes from the sum"):
        checks.check_run(Objective([Term("post-train", adv.SignedReward())]), data, trainer)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ("advantage: LeaveOneIn", r"model.init_args.terms.advantage: LeaveOneIn is not .* Did you mean LeaveOneOut\?"),
        ("advantages: GroupStd", r"model.init_args.terms.advantages: Term has no such .* Did you mean advantage\?"),
        ("weight: nowhere.weight", r"model.init_args.terms.weight: nowhere.weight is not what can be imported here"),
        ("contributing: wrong", r"model.init_args.terms.contributing: wrong must be one of all, positive, negative"),
        ("aggregation: {class_path: ConstantLength}", r"model.init_args.terms.aggregation.init_args.tokens: missing"),
        ("surrogate: {class_path: GSPO, init_args: {clip_low: -1}}", "GSPO.clip_low: -1.0 must be"),
        ("coefficient: {class_path: Linear, init_args: {start: -1, end: 0, steps: 3}}", "Linear.start: -1.0 must be"),
        ("coefficient: -1", "terms.coefficient: -1.0 must be"),
        ("advantage: GroupMean, normalisation: mean", "terms.normalisation: it is another word"),
    ],
)
def test_a_wrong_term_is_named(parse, term, said):
    terms = yaml.safe_load(f"[{{space: post-train, {term}}}]")
    with pytest.raises((InputError, ArgumentError, ValueError)) as caught:
        parse({"class_path": "Objective", "init_args": {"terms": terms}})
    ours = said_by_us(caught.value) or refusals.of_parser(caught.value.message, [])
    assert re.match(said, str(ours)), str(ours)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"entropy_coefficient": -0.1}, "Objective.entropy_coefficient: -0.1 must be"),
        ({"entropy_coefficient": {"target": -1}}, "TargetEntropy.target: -1.0 must be"),
        ({"kl_in": "rewards"}, "model.init_args.kl_in: rewards must be one of loss, reward. Did you mean reward"),
        ({"kl_estimator": "k4"}, "model.init_args.kl_estimator: k4 must be one of k1, k2, k3"),
    ],
)
def test_a_wrong_penalty_is_named(parse, option, said):
    with pytest.raises((InputError, ArgumentError, ValueError)) as caught:
        parse({"class_path": "Objective", "init_args": {"terms": [{"space": "post-train"}], **option}})
    ours = said_by_us(caught.value) or refusals.of_parser(caught.value.message, [])
    assert str(ours).startswith(said), str(ours)


def test_no_term_is_no_objective():
    with pytest.raises(InputError, match=r"Objective\.terms: there is none"):
        Objective([])
