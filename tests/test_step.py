"""Whole training steps through a Trainer, against loops of plain words: what is clipped, skipped, kept and refused."""

from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from plain_engine import PlainEngine
from torch.optim import SGD, AdamW
from trainers import quiet_trainer
from transformers import AutoModelForCausalLM

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.advantages import group_advantages
from prerl_lightning.objectives.passes import Passes
from prerl_lightning.objectives.settings import BatchSettings, LossSettings
from prerl_lightning.objectives.update import Update
from prerl_lightning.policy.model import Policy
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Sampling

G, P = 4, 2


def alternating_reward(prompt, response, ground_truth, extra):
    return float(len(response) % 2)


def fit(model, steps=1, ckpt_path=None, reward=alternating_reward, **options):
    L.seed_everything(0)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=reward,
        verification=Verification(workers=0),  # a worker would import this module, and with it Lightning
        sampling=Sampling(group_size=G, max_new_tokens=8, temperature=0.9),
        engine=PlainEngine(),
        prompts_per_step=P,
    )
    trainer = quiet_trainer(
        max_steps=steps,
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.live_policy.parameters()]).double()


def start(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def sgd(parameters):
    return SGD(parameters)


def plain_update(folder, rollout, objective, lr, minibatches, epochs, clip, gradient_clip):
    """fp64: old log-probs once, from the weights that sampled; then an SGD step a minibatch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    parameters = list(model.parameters())
    space = objective.terms[0]
    normalisation = "std" if objective.terms == GRPO.terms else "mean"
    advantages = group_advantages(rollout.rewards, rollout.group_ids, normalisation)
    counted = advantages < 0 if space.contributing == "negative" else torch.ones_like(advantages, dtype=torch.bool)

    def log_probs(i):
        context = list(rollout.prompts[int(rollout.group_ids[i])].token_ids) if space.space == "post-train" else [1]
        ids = torch.tensor([*context, *rollout.responses[i].token_ids.tolist()])
        logits = model(ids[None]).logits[0, len(context) - 1 : -1] / rollout.temperature
        return F.log_softmax(logits, -1).gather(1, ids[len(context) :, None])[:, 0]

    with torch.no_grad():
        old = [log_probs(i) for i in range(len(rollout))]
    norms = []
    for _ in range(epochs):
        for prompts in torch.arange(P).tensor_split(minibatches):
            numbers = [i for i in range(len(rollout)) if counted[i] and int(rollout.group_ids[i]) in prompts.tolist()]
            if not numbers:  # a step that changes nothing
                continue
            tokens = sum(len(old[i]) for i in numbers)
            loss = torch.zeros((), dtype=torch.float64)
            for i in numbers:
                ratio = (log_probs(i) - old[i]).exp()
                a = advantages[i]
                token = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
                token = torch.minimum(token, -a * 10.0) if a < 0 else token
                loss = loss + token.sum() / tokens
            gradient = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            norms.append(float(norm))
            scale = gradient_clip / norm if 0 < gradient_clip < norm else 1.0
            with torch.no_grad():
                for p, g in zip(parameters, gradient, strict=True):
                    p -= lr * scale * g
    return torch.cat([p.detach().flatten() for p in parameters]), norms


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL])
@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("gradient_clip", [0.0, 0.05])
def test_a_step_is_that_of_a_plain_loop(model_folder, objective, minibatches, epochs, gradient_clip):
    """Clipping, and old log-probs where there are several updates: at this rate the ratio leaves its bounds."""
    folder = model_folder("llama-untied")
    lr = 0.05 if gradient_clip == 0 else 1.0
    options = {"lr": lr, "optimizer": sgd, "gradient_clip": gradient_clip, "clip_low": 0.02, "clip_high": 0.02}
    model = objective(model=folder, minibatches=minibatches, epochs=epochs, **options)
    trainer = fit(model, steps=minibatches * epochs)
    expected, norms = plain_update(folder, model.rollout, model, lr, minibatches, epochs, 0.02, gradient_clip)
    before = start(folder)
    moved, should = weights(model) - before, expected - before
    assert should.norm() > 1e-3
    assert float((moved - should).norm() / should.norm()) < 2e-4
    assert float(trainer.callback_metrics["optim/grad_norm"]) == pytest.approx(norms[-1], rel=1e-3)
    if gradient_clip:
        assert max(norms) > gradient_clip
        if minibatches * epochs == 1:
            assert float(moved.norm()) == pytest.approx(lr * gradient_clip, rel=1e-4)
    elif epochs > 1:
        assert float(trainer.callback_metrics["optim/clipped"]) > 0


def test_an_update_needs_no_module(model_folder, make_rollout):
    """A policy, an objective's terms, settings and torch's optimizer: the step of a plain loop."""
    folder, rollout = model_folder("llama-untied"), make_rollout(P, G, rewards=[1, 0, 0, 1, 0, 1, 1, 1])
    settings = LossSettings(
        loss_coefficient=1.0,
        clip_low=0.02,
        clip_high=0.02,
        clip_dual=10.0,
        aggregation="token-mean",
        kl_coefficient=0.0,
        kl_estimator="k3",
        importance_sampling="none",
        importance_cap=2.0,
    )
    batching = BatchSettings(2, 2, None, None, packing=True, share_prompts=True)
    policy, terms = Policy.from_pretrained(folder), GRPO.terms
    before = torch.cat([p.detach().flatten() for p in policy.parameters()]).double()
    update = Update(Passes(rollout, policy, batching), terms, settings)
    found = update.run(SGD(policy.parameters(), lr=9.0), [0.05] * 4, gradient_clip=0.05)
    expected, norms = plain_update(folder, rollout, GRPO, 0.05, 2, 2, 0.02, 0.05)
    moved = torch.cat([p.detach().flatten() for p in policy.parameters()]).double() - before
    should = expected - before
    assert should.norm() > 1e-4
    assert float((moved - should).norm() / should.norm()) < 1e-3
    assert found["optim/grad_norm"] == pytest.approx(norms[-1], rel=1e-3)
    assert found["optim/lr"] == 0.05
    with pytest.raises(ValueError, match="shorter"):
        update.run(SGD(policy.parameters(), lr=9.0), [0.05])


def test_a_step_whose_gradient_is_not_finite_changes_nothing(model_folder, monkeypatch):
    folder = model_folder("llama-untied")
    plain, seen = Update.backward, []

    def poisoned(self, *args, **kwargs):
        jobs = plain(self, *args, **kwargs)
        seen.append(weights(model))
        if len(seen) == 2:  # of three steps
            next(p for p in self.policy.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return jobs

    monkeypatch.setattr(Update, "backward", poisoned)
    model = GRPO(model=folder, lr=0.1)  # Adam: its moments must stay finite too
    trainer = fit(model, steps=3)
    assert weights(model).isfinite().all()
    assert not torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[1])
    assert not torch.equal(weights(model), seen[2])
    state = trainer.optimizers[0].state_dict()["state"]
    assert all(s["exp_avg"].isfinite().all() and float(s["step"]) == 2 for s in state.values())


@pytest.mark.parametrize("version", [1, None, -1])
def test_a_rollout_of_other_weights_is_refused(model_folder, version):
    model = GRPO(model=model_folder("llama-untied"))
    trainer = fit(model)
    stale = replace(model.rollout, policy_version=version)
    assert trainer.global_step == 1
    if version == 1:
        model.update(stale)
        return
    with pytest.raises(RuntimeError, match="strictly on-policy"):
        model.update(stale)


def test_an_engine_that_holds_other_weights_does_not_sample(model_folder):
    model = GRPO(model=model_folder("llama-untied"))
    trainer = fit(model)
    data = trainer.datamodule
    with pytest.raises(RuntimeError, match="call sync first"):
        data.rollout(data.some_prompts(2), trainer.global_step)


def test_each_step_samples_from_the_weights_of_the_step_before(model_folder):
    """One update a step and one at the start, and log-probs that are the trainer's."""
    model = GRPO(model=model_folder("llama-untied"), lr=0.01)
    trainer = fit(model, steps=3)
    assert trainer.datamodule.engine.n_updates == 3
    assert float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-5


def test_the_optimizer_s_settings_are_the_configuration_s_on_resume(model_folder, tmp_path):
    """torch's optimizers bring those of the checkpoint back with their state."""
    folder = model_folder("llama-untied")
    trainer = fit(GRPO(model=folder, optimizer=lambda p: AdamW(p, betas=(0.5, 0.9))), steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model = GRPO(model=folder, optimizer=lambda p: AdamW(p, weight_decay=0.1, betas=(0.8, 0.9)))
    resumed = fit(model, steps=2, ckpt_path=tmp_path / "one.ckpt")
    groups = resumed.optimizers[0].param_groups
    assert [(g["weight_decay"], g["betas"]) for g in groups] == [(0.1, (0.8, 0.9)), (0.0, (0.8, 0.9))]
    assert all(float(s["step"]) == 2 for s in resumed.optimizers[0].state.values())


def test_the_mismatch_is_measured_where_the_first_minibatch_has_no_gradient(model_folder):
    prompts, calls = [], iter(range(100))

    def reward(prompt, response, ground_truth, extra):
        prompts.append(prompt)
        return 0.0 if prompt == prompts[0] else float(next(calls) % 2)

    model = GRPO(model=model_folder("llama-untied"), minibatches=2, lr=0.1)
    trainer = fit(model, steps=2, reward=reward)
    assert float(trainer.callback_metrics["optim/skipped"]) == 1
    assert 0 < float(trainer.callback_metrics["mismatch/log_prob_difference"]) < 1e-5
