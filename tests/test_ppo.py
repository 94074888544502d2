"""PPO: GAE and its losses against closed forms and enumeration, steps against a loop of plain words, and its life in a
run: second or only, resumed, on one process and two."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import Forked, finish_together
from ppo_worker import lives, run
from test_step import sgd
from test_update import attached
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from prerl_lightning.budget import ModelShape, checkpoint_bytes
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, PPO
from prerl_lightning.objectives.advantages import generalised_advantages
from prerl_lightning.objectives.losses import clipped_value_loss
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy, load_config

# ---------------------------------------------------------------------- closed forms


def test_gae_is_its_sum():
    generator, lengths = torch.Generator().manual_seed(0), [3, 0, 1, 5]
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    for gamma, lam in itertools.product((1.0, 0.9, 0.0), repeat=2):
        found = generalised_advantages(rewards, values, torch.tensor(lengths), gamma, lam).split(lengths)
        for r, v, a in zip(rewards.split(lengths), values.split(lengths), found, strict=True):
            n, v = len(r), [*v.tolist(), 0.0]
            deltas = [float(r[t]) + gamma * v[t + 1] - v[t] for t in range(n)]
            expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
            assert a.tolist() == pytest.approx(expected)
            if gamma == lam == 1:  # the reward to come, less the value
                assert a.tolist() == pytest.approx([float(r[t:].sum()) - v[t] for t in range(n)])
    assert not len(generalised_advantages(*torch.zeros(2, 0), torch.tensor([0, 0]), 1.0, 1.0))


@pytest.mark.parametrize(("lam", "wrong"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 0.7)])
def test_gae_gives_the_gradient_of_the_expected_reward(lam, wrong):
    """Of an MDP small enough to go through all that can happen: with the true values for each lambda, with wrong ones
    for lambda 1. Two tokens; the first of them may end the response."""
    rewards = {(0,): 0.3, (1, 0): 1.0, (1, 1): -0.4, (2, 0): 0.0, (2, 1): 0.9}
    logits = torch.tensor([[0.2, -0.5, 0.4], [0.3, 0.1, -9.0], [-0.7, 0.6, -9.0]], dtype=torch.float64)
    logits.requires_grad_()  # of the first token, and of the second behind 1 and behind 2
    log_p = torch.cat([logits[:1].log_softmax(-1), F.pad(logits[1:, :2].log_softmax(-1), (0, 1))])
    steps = {path: [log_p[t and path[0], token] for t, token in enumerate(path)] for path in rewards}
    chance = {path: torch.stack(of).sum().exp() for path, of in steps.items()}
    expected = sum(chance[path] * reward for path, reward in rewards.items())
    behind = [sum(float(log_p[s, t].detach().exp()) * rewards[s, t] for t in (0, 1)) for s in (1, 2)]
    value = {(): float(expected.detach()) + wrong, (1,): behind[0] - wrong, (2,): behind[1] + 2 * wrong}
    lengths = torch.tensor([len(path) for path in rewards])
    values = torch.tensor([value[path[:t]] for path in rewards for t in range(len(path))], dtype=torch.float64)
    given = torch.tensor([r * (t == len(p) - 1) for p, r in rewards.items() for t in range(len(p))]).double()
    advantages = generalised_advantages(given, values, lengths, 1.0, lam).split(lengths.tolist())
    surrogate = sum(
        float(chance[path].detach()) * float(a) * log_prob
        for path, of_path in zip(rewards, advantages, strict=True)
        for a, log_prob in zip(of_path, steps[path], strict=True)
    )
    (exact,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, exact)


def test_value_loss_is_its_formula():
    old, goal = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    values = torch.tensor([0.6, 0.9, 0.9, 0.1], requires_grad=True)
    loss, clipped = clipped_value_loss(values, old, goal, 0.2)
    # beyond the bound and nearer to the goal there is no gradient; further from it there is
    torch.testing.assert_close(loss.detach(), torch.tensor([0.08, 0.045, 0.405, 0.045]))
    assert clipped.tolist() == [False, True, False, True]
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([-0.4, 0.0, 0.9, 0.0]))
    loss, clipped = clipped_value_loss(values, old, goal, None)
    torch.testing.assert_close(loss, (values - goal) ** 2 / 2)
    assert not clipped.any()


# ---------------------------------------------------------------------- a step

GAMMA, LAMBDA, CLIP, VALUE_CLIP, KL = 0.95, 0.8, 0.02, 0.05, 0.3
LR, VALUE_LR = 0.01, 0.02


def plain_update(folder, rollout, own, head, reference, minibatches, epochs):
    """fp64, one response at a time: the moves of the policy, of the head and of the value model's own body."""
    policy, frozen = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (folder, reference))
    body = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) if own else policy
    head = head.double().requires_grad_()
    learned = [head, *(body.parameters() if own else ())]
    start = [[p.detach().clone() for p in some] for some in (policy.parameters(), [head], body.parameters())]

    def forward(model, i):
        context = list(rollout.prompts[int(rollout.group_ids[i])].token_ids)
        ids = torch.tensor([*context, *rollout.responses[i].token_ids.tolist()])
        hidden = model.base_model(ids[None]).last_hidden_state[0, len(context) - 1 : -1]
        log_probs = F.log_softmax(model.get_output_embeddings()(hidden) / rollout.temperature, -1)
        return log_probs.gather(1, ids[len(context) :, None])[:, 0], hidden if own else hidden.detach()

    with torch.no_grad():
        old = [forward(policy, i)[0] for i in range(len(rollout))]
        values = [forward(body, i)[1] @ head for i in range(len(rollout))]
        apart = [old[i] - forward(frozen, i)[0] for i in range(len(rollout))]
    advantages = []
    for i, v in enumerate(values):
        following, value, found = 0.0, 0.0, []
        for t in reversed(range(len(v))):
            reward = -KL * apart[i][t] + (float(rollout.rewards[i]) if t == len(v) - 1 else 0.0)
            following = reward + GAMMA * value - v[t] + GAMMA * LAMBDA * following
            value = v[t]
            found.insert(0, following)
        advantages.append(torch.stack(found))
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    of_all = torch.cat(advantages)
    advantages = [(a - of_all.mean()) / (of_all.std(correction=0) + 1e-6) for a in advantages]

    def descend(loss, parameters, lr):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # an untied head is nothing to values
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= lr * g if g is not None else 0.0

    for prompts in torch.arange(len(rollout.prompts)).tensor_split(minibatches) * epochs:
        numbers = [i for i in range(len(rollout)) if int(rollout.group_ids[i]) in prompts.tolist()]
        n, total = sum(len(old[i]) for i in numbers), 0.0
        for i in numbers:
            v = forward(body, i)[1] @ head
            bound = values[i] + (v - values[i]).clamp(-VALUE_CLIP, VALUE_CLIP)
            total = total + torch.maximum((v - returns[i]) ** 2, (bound - returns[i]) ** 2).sum() / 2 / n
        descend(total, learned, VALUE_LR)
        total = 0.0
        for i in numbers:
            ratio, a = (forward(policy, i)[0] - old[i]).exp(), advantages[i]
            token = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP))
            total = total + torch.where(a < 0, torch.minimum(token, -a * 10.0), token).sum() / n
        descend(total, list(policy.parameters()), LR)
    ends = (policy.parameters(), [head], body.parameters())
    return [torch.cat([(b - a).flatten() for a, b in zip(s, e, strict=True)]) for s, e in zip(start, ends, strict=True)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("minibatches", "epochs", "pieces"), [(1, 1, 1), (2, 2, None)])
def test_an_update_is_that_of_a_plain_loop(model_folder, make_rollout, tmp_path, own, minibatches, epochs, pieces):
    """With a KL penalty in the reward of each token to a reference that is not the policy any more."""
    folder, rollout = model_folder("llama-untied"), make_rollout(4, 2, rewards=[1, 0, 0, 0, 1, 1, 0, 1])
    module = attached(
        PPO, folder, value_body="own" if own else "policy", lr=LR, value_lr=VALUE_LR, optimizer=sgd,
        gradient_clip=0.0, clip_low=CLIP, clip_high=CLIP, value_clip=VALUE_CLIP, gamma=GAMMA, gae_lambda=LAMBDA,
        minibatches=minibatches, epochs=epochs, micro_batch_size=pieces, kl_coefficient=KL, kl_in="reward",
    )  # fmt: skip
    with torch.no_grad():
        module.anchored_reference()
        generator = torch.Generator().manual_seed(1)
        for name, p in module.policy.named_parameters():  # the reference becomes another model than the policy
            module.reference.shards[name] = p + 0.02 * torch.randn(p.shape, generator=generator)
        critic = module.critic()
        critic.model.head.weight.copy_(0.05 * torch.randn(64, generator=generator))
    with module.reference.in_place(module.policy):
        module.policy.model.save_pretrained(tmp_path)
    before = [torch.cat([p.detach().flatten() for p in module.policy.parameters()]), critic.model.head.weight.clone()]
    body = [p.detach().clone() for p in critic.model.body.model.parameters()]
    expected = plain_update(folder, rollout, own, critic.model.head.weight.detach(), tmp_path, minibatches, epochs)
    metrics = module.make_update(rollout).run(module.make_optimizer(), [LR] * minibatches * epochs)
    after = torch.cat([p.detach().flatten() for p in module.policy.parameters()]), critic.model.head.weight.detach()
    moves = [b - a for a, b in zip(before, after, strict=True)]
    moves.append(
        torch.cat([(p - q).detach().flatten() for p, q in zip(critic.model.body.model.parameters(), body, strict=True)])
    )
    for found, should in zip(moves, expected, strict=True):
        assert should.norm() > 1e-3
        assert float((found - should).norm() / should.norm()) < 5e-4
    assert (metrics["value/clipped"] > 0) == (epochs > 1)
    assert (metrics["optim/clipped"] > 0) == (epochs > 1)
    assert metrics["value/explained_variance"] < 1
    assert metrics["mismatch/log_prob_difference"] >= 0


def test_in_warm_up_the_value_model_learns_alone(model_folder, make_rollout):
    folder, rollout = model_folder("llama-tied"), make_rollout(4, 1)  # groups of one
    module = attached(PPO, folder, value_lr=1e-2, epochs=2, value_warmup_steps=40, entropy_coefficient=0.1)
    before = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    optimizer, found = module.make_optimizer(), []
    for rollouts in range(21):
        found.append(module.make_update(rollout, life_step=2 * rollouts).run(optimizer, [1e-3] * 2))
        now = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
        assert torch.equal(now, before) == (rollouts < 20)
    assert [m["optim/skipped"] for m in found] == [2] * 20 + [0]
    assert all("mismatch/kl" in metrics for metrics in found)
    assert found[0]["value/mean"] == 0.0  # it begins at zero, explains nothing, and ends up with what it has seen
    assert found[0]["value/explained_variance"] == pytest.approx(0.0)
    assert found[-1]["value/explained_variance"] > 0.5
    assert found[-1]["value/loss"] < 0.5 * found[0]["value/loss"]
    update = module.make_update(rollout)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in update.passes.micro_batches("post-train", update.own):
            module.critic().model(batch)
    # the utilisation's arithmetic has the value model's: forward and backward, two epochs
    assert found[0]["train/flops"] == pytest.approx(6 * counter.get_total_flops(), rel=0.1)
    assert found[-1]["train/flops"] > 2 * found[0]["train/flops"]


def test_a_value_model_of_no_finite_gradient_stays(model_folder, make_rollout, caplog):
    module = attached(PPO, model_folder("llama-tied"), value_body="policy")
    with torch.no_grad():
        module.critic().model.head.weight.fill_(1e30)
    module.make_update(make_rollout(2, 2)).learn(torch.ones(4, dtype=torch.bool))
    assert "value model's gradient norm is inf" in caplog.text
    assert bool((module.critic().model.head.weight == 1e30).all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"value_lr": -1.0}, r"PPO\.value_lr: -1\.0 must be a finite number of at least 0"),
        ({"gamma": 1.5}, r"PPO\.gamma: 1\.5 must be a finite number of at most 1"),
        ({"gae_lambda": -0.1}, r"PPO\.gae_lambda: -0\.1 must be"),
        ({"value_clip": 0.0}, r"PPO\.value_clip: 0\.0 must be a finite number above 0"),
        ({"value_warmup_steps": 3, "epochs": 2}, r"PPO\.value_warmup_steps: 3 end within .* Write a multiple of 2\."),
    ],
)
def test_what_it_cannot_have_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        PPO(**options)


# ---------------------------------------------------------------------- a life


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """Uninterrupted runs on one process by their value body, with their folders."""
    made = {}

    def make(body):
        if body not in made:
            folder = tmp_path_factory.mktemp(body)
            made[body] = (*run(model_folder("llama-tied"), body, folder), folder)
        return made[body]

    return make


def start(folder):
    return torch.cat([w.flatten() for _, w in sorted(Policy.from_pretrained(folder).named_weights())]).double()


def far(found, expected, origin):
    return float((found - expected).norm() / (expected - origin).norm())


def test_resumed_in_mid_life_it_goes_on(whole, model_folder, tmp_path):
    """As second life; a value model, or its optimizer's state, that was lost would show in both."""
    folder = model_folder("llama-tied")
    policy, value, there = whole("own")
    again, value_again = run(folder, "own", tmp_path, ckpt_path=there / "step=2.ckpt")
    assert far(again, policy, start(folder)) < 1e-5
    before, saved = (torch.load(there / f"step={step}.ckpt") for step in (1, 2))
    assert far(value_again, value, torch.cat([w.flatten() for w in saved["lives"]["value"]["weights"].values()])) < 1e-5
    assert before["state_dict"].keys() == saved["state_dict"].keys()
    assert "value" not in before["lives"]


def test_as_the_only_life(model_folder, tmp_path):
    folder = model_folder("llama-tied")

    def life():
        return PPO(model=folder, lr=1e-2, value_lr=1e-2, value_body="policy", minibatches=2)

    policy, value = run(life(), None, tmp_path / "whole", steps=4, callbacks=[])
    again, value_again = run(life(), None, tmp_path / "again", 4, tmp_path / "whole" / "step=2.ckpt", callbacks=[])
    assert far(again, policy, start(folder)) < 1e-5
    saved = torch.load(tmp_path / "whole" / "step=2.ckpt")["lives"]["value"]["weights"]["weight"]
    assert far(value_again, value, saved) < 1e-5


def test_a_value_model_is_gone_behind_its_life_and_waits_in_front(model_folder, make_rollout):
    module = attached(PPO, model_folder("llama-tied"), value_body="policy", value_lr=1e-2)
    assert module.life_state()["value"] is None
    module.make_update(make_rollout(2, 2, rewards=[1, 0, 1, 1])).learn(torch.ones(4, dtype=torch.bool))
    state = module.life_state()
    module.let_go()
    assert module.life_state()["value"] is None
    module.restore_life(state)
    assert module.life_state() == state  # as when a resumed run is saved before its first step
    assert torch.equal(module.critic().model.head.weight, state["value"]["weights"]["weight"])
    assert state["value"]["weights"]["weight"].any()


def test_value_models_are_not_taken_for_one_another(whole, model_folder, tmp_path):
    folder, (_, _, there) = model_folder("llama-tied"), whole("policy")
    with pytest.raises(InputError, match=r"model\.init_args\.value_body: the checkpoint's value model is another"):
        run(folder, "own", tmp_path, ckpt_path=there / "step=2.ckpt")
    checkpoint = torch.load(there / "step=2.ckpt")
    del checkpoint["lives"]["value"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    with pytest.raises(InputError, match="the checkpoint has no value model"):
        run(folder, "policy", tmp_path, ckpt_path=tmp_path / "without.ckpt")
    with pytest.raises(InputError, match="then PPO from step 1, the configuration's NSRPreRL from step 0"):
        run(folder, None, tmp_path, ckpt_path=there / "step=2.ckpt", callbacks=[])


def test_two_ranks_learn_what_one_does(whole, model_folder, tmp_path, free_port):
    """On ddp and fsdp2, and resumed by each from the other's checkpoint in PPO's life."""
    folder = model_folder("llama-tied")
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    shared |= {"OMP_NUM_THREADS": 1, "TORCHELASTIC_RUN_ID": "test"}
    ranks = [{**os.environ, **{k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()}} for r in (0, 1)]
    worker = Path(__file__).with_name("ppo_worker.py")
    finish_together([Forked([worker, tmp_path, folder], env=env) for env in ranks])
    found, origin, head = torch.load(tmp_path / "found.pt"), start(folder), torch.zeros(64)
    body = torch.cat([p.detach().flatten() for p in Policy.from_pretrained(folder).parameters()])
    assert len(found) == 5
    for name, (policy, value) in found.items():
        expected, expected_value, _ = whole("policy" if name.startswith("policy") else "own")
        begun = head if name.startswith("policy") else torch.cat([body, head])
        # Adam makes whole steps of gradients that are nothing but rounding; a lost moment is more than 0.1
        assert far(policy, expected, origin) < 1e-2, name
        assert far(value, expected_value, begun) < 1e-2, name


def test_its_memory_is_reckoned_with(model_folder):
    from prerl_lightning.objectives.memory import copies

    config = load_config(model_folder("llama-tied"))
    shape, adapted = ModelShape.of_config(config), ModelShape.of_config(config, Lora(rank=4))
    assert copies(GRPO(), [], shape) == (0, 0)
    assert copies(GRPO(kl_coefficient=0.1), lives("policy"), shape) == (1, 1)
    assert copies(GRPO(kl_coefficient=0.1), lives("own"), shape) == (4, 3)
    assert copies(PPO(kl_coefficient=0.1), [], shape) == (5, 4)
    in_memory, on_disk = copies(PPO(lora=Lora(rank=4)), [], adapted)  # all of the body, beside adapters
    assert in_memory * adapted.trained >= 4 * shape.parameters
    assert on_disk * adapted.trained >= 3 * shape.parameters
    assert checkpoint_bytes(shape, 4) == pytest.approx(7 / 3 * checkpoint_bytes(shape), abs=1)
    assert checkpoint_bytes(shape, 4, weights_only=True) == pytest.approx(checkpoint_bytes(shape) / 3, abs=1)
