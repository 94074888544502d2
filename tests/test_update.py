"""The optimisation loop against plain computations, on a random-weight model in fp32."""

from itertools import combinations_with_replacement

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from prerl_lightning.objectives import GRPO, NSRRL, PSRRL, MixedRL, NSRPreRL, PreRL, PSRPreRL
from prerl_lightning.objectives.advantages import contributing_responses, group_advantages

OBJECTIVES = [GRPO, NSRPreRL, PSRPreRL, PreRL, NSRRL, PSRRL, MixedRL]


def attached(cls, folder, **options):
    """A module with its policy, and no Trainer."""
    module = cls(model=folder, **options)
    module.configure_model()
    return module


def gradient(module, rollout, n_expected=None):
    """The gradient of one minibatch over the whole rollout, as one vector in fp64."""
    update = module.make_update(rollout)
    works = [update.work(term) for term in module.terms]
    passes = update.backward(works, torch.ones(len(rollout), dtype=torch.bool), on_policy=True)
    if n_expected is not None:
        assert passes == n_expected
    return torch.cat([p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]).double()


def by_response(values, rollout):
    """(T,) values of all response tokens, cut into (T_i,)."""
    return values.split(rollout.lengths.tolist())


def plain_log_probs(folder, context, response, temperature, dtype=torch.float32):
    """Token log-probs by one plain Hugging Face forward over context + response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits = model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    return F.log_softmax(logits / temperature, -1).gather(1, torch.tensor([*response])[:, None])[:, 0]


def close(a, b, tolerance=1e-5):
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("shape", ["llama-tied", "qwen2-tied", "qwen3-untied"])
def test_log_probs_equal_a_plain_forward(model_folder, make_rollout, shape):
    module, rollout = attached(GRPO, model_folder(shape)), make_rollout()
    passes = module.make_passes(rollout, module.prefix_id)
    everything = torch.ones(len(rollout), dtype=torch.bool)
    for space, context in (("post-train", None), ("pre-train", (module.prefix_id,))):
        found = by_response(passes.log_probs(space, everything), rollout)
        for i, response in enumerate(rollout.responses):
            prompt = rollout.prompts[int(rollout.group_ids[i])].token_ids
            expected = plain_log_probs(model_folder(shape), context or prompt, response.token_ids, 0.7)
            torch.testing.assert_close(found[i], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL])
def test_entropy_is_that_of_plain_forwards(model_folder, make_rollout, objective):
    """GRPO: of what it forwards anyway; NSR-PreRL: of the responses that compare engine and trainer."""
    module, rollout = attached(objective, model_folder("llama-tied"), entropy=True, mismatch_samples=2), make_rollout()
    update = module.make_update(rollout)
    works = [update.work(term) for term in module.terms]
    update.backward(works, torch.ones(len(rollout), dtype=torch.bool), on_policy=True)
    if objective is NSRPreRL:
        update._measure_mismatch()
    numbers = works[0].selected.nonzero().flatten().tolist() if objective is GRPO else [0, 1]
    lm, entropies = AutoModelForCausalLM.from_pretrained(model_folder("llama-tied"), dtype=torch.float32), []
    for i in numbers:
        prompt = rollout.prompts[int(rollout.group_ids[i])].token_ids
        logits = lm(torch.tensor([[*prompt, *rollout.responses[i].token_ids]])).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits / rollout.temperature).entropy())
    found = update.sums.reduced()["optim/entropy"]
    assert found == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)


def test_log_p_y_does_not_see_the_prompt(model_folder, make_rollout):
    from dataclasses import replace

    module, rollout = attached(PreRL, model_folder("llama-tied")), make_rollout()
    other = tuple(replace(p, token_ids=(1, 9, 9, 9, 9)) for p in rollout.prompts)
    everything = torch.ones(len(rollout), dtype=torch.bool)
    a = module.make_passes(rollout).log_probs("pre-train", everything)
    b = module.make_passes(replace(rollout, prompts=other)).log_probs("pre-train", everything)
    assert torch.equal(a, b)
    c = module.make_passes(replace(rollout, prompts=other)).log_probs("post-train", everything)
    d = module.make_passes(rollout).log_probs("post-train", everything)
    assert not torch.allclose(c[: rollout.lengths[0]], d[: rollout.lengths[0]])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_does_not_depend_on_micro_batches(model_folder, make_rollout, objective):
    rollout = make_rollout()
    results = [
        gradient(attached(objective, model_folder("llama-tied"), **options), rollout)
        for options in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"max_tokens_per_microbatch": 40})
    ]
    for result in results[1:]:
        close(result, results[0])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_nsr_prerl_equals_a_plain_loop_in_fp64(model_folder, make_rollout, aggregation):
    """Loss from the definition: mean over the negatives' tokens of -A log p(y_t | y_<t), one response at a time."""
    folder, rollout = model_folder("llama-tied"), make_rollout()
    module = attached(NSRPreRL, folder, aggregation=aggregation)
    advantages = group_advantages(rollout.rewards, rollout.group_ids, "mean")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, response in enumerate(rollout.responses):
        if advantages[i] < 0:
            ids = [module.prefix_id, *response.token_ids]
            log_probs = F.log_softmax(model(torch.tensor([ids[:-1]])).logits[0] / 0.7, -1)
            token = log_probs.gather(1, torch.tensor(ids[1:])[:, None])
            total = total + (-advantages[i] * token).sum() / (1 if aggregation == "token-mean" else len(token))
            count += len(token) if aggregation == "token-mean" else 1
    (total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    close(gradient(module, rollout), expected)


def test_nothing_is_forwarded_without_a_gradient(model_folder, make_rollout):
    folder = model_folder("llama-tied")
    all_equal = make_rollout(2, 4, rewards=[1, 1, 1, 1, 0, 0, 0, 0])
    for objective in OBJECTIVES:
        update = attached(objective, folder).make_update(all_equal)
        assert update.backward([update.work(t) for t in update.terms], torch.ones(8).bool(), True) == 0
    mixed = make_rollout(2, 4, rewards=[1, 0, 0, 1, 0, 0, 0, 0])
    for objective, count in ((GRPO, 4), (NSRPreRL, 2), (PSRPreRL, 2)):
        update = attached(objective, folder).make_update(mixed)
        assert int(update.work(update.terms[0]).selected.sum()) == count


def test_rewards_whose_float_mean_misses_them_have_no_advantage():
    rewards = torch.full((6,), 0.1, dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64).index_add_(0, torch.zeros(6).long(), rewards)
    assert float(total / 6) != 0.1
    for kind in ("std", "mean"):
        assert torch.equal(group_advantages(rewards, torch.zeros(6).long(), kind), torch.zeros(6).double())
    single = group_advantages(torch.tensor([0.5]), torch.tensor([3]), "std")
    torch.testing.assert_close(single, torch.tensor([0.5], dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_reward_that_is_the_mean_has_no_advantage_whatever_the_rounding():
    """(0.1 + 0.2 + 0.3) / 3 is above 0.2: NSR's denominator would have counted that response."""
    for rewards in combinations_with_replacement(range(11), 4):
        exact = torch.tensor([4 * r == sum(rewards) for r in rewards])
        groups = torch.zeros(4).long()
        for kind in ("std", "mean"):
            found = group_advantages(torch.tensor(rewards, dtype=torch.float64) / 10, groups, kind)
            assert torch.equal(found == 0, exact)
    third = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    advantages = group_advantages(third, torch.zeros(3).long(), "mean")
    assert contributing_responses(advantages, "negative").tolist() == [True, False, False]


def test_advantages_are_those_of_each_group_alone():
    """Groups of 1 to 4 responses in any order, against Python's statistics."""
    from statistics import mean, stdev

    groups = [7, 2, 7, 5, 2, 7, 2, 2, 9, 9]
    rewards = [0.0, 1.0, 1.0, 0.3, 0.0, 0.25, 0.5, -1.0, 0.5, 2.5]
    expected = {"mean": [], "std": []}
    for group, reward in zip(groups, rewards, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centre, spread = (mean(own), stdev(own)) if len(own) > 1 else (0.0, 1.0)
        expected["mean"].append(reward - centre)
        expected["std"].append((reward - centre) / (spread + 1e-6))
    for kind, values in expected.items():
        found = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), kind)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_which_responses_contribute():
    advantages = torch.tensor([-0.5, 0.0, 1e-9, -1e-9, 2.0])
    for which, expected in (("all", "11111"), ("positive", "00101"), ("negative", "10010")):
        assert "".join(str(int(c)) for c in contributing_responses(advantages, which)) == expected


def test_estimators_of_the_kl_and_weights_of_sequences():
    from math import exp

    from prerl_lightning.objectives.aggregations import ConstantLength, SeqMeanTokenMean, TokenMean
    from prerl_lightning.objectives.losses import kl_penalty

    p, q = torch.tensor([-1.0, -2.0, -0.5, -30.0]), torch.tensor([-1.0, -1.5, -2.0, -1.0])
    assert kl_penalty(p, q, "k1").tolist() == pytest.approx([0, -0.5, 1.5, -29])
    assert kl_penalty(p, q, "k2").tolist() == pytest.approx([0, 0.125, 1.125, 29**2 / 2])
    k3 = [0, exp(0.5) - 1 - 0.5, exp(-1.5) - 1 + 1.5, exp(20) - 1 - 29]  # the ratio's exponent is at most 20
    assert kl_penalty(p, q, "k3").tolist() == pytest.approx(k3)

    lengths = torch.tensor([3, 7, 2])
    expected = ((TokenMean(), [1, 1, 1], 12), (SeqMeanTokenMean(), [1 / 3, 1 / 7, 1 / 2], 3))
    for way, weights, total in (*expected, (ConstantLength(64), [1, 1, 1], 192)):
        found = way.weights(lengths)
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=0)
        assert way.denominator(lengths) == total


def test_the_surrogate_token_by_token():
    """Ratios on both sides of bounds that differ, under either sign; gradients by the chain rule."""
    from math import exp, log

    from prerl_lightning.objectives.losses import clipped_surrogate

    low, high, dual = 0.1, 0.4, 3.0
    cases = [(r, a) for r in (0.5, 0.92, 1.0, 1.2, 1.7, 4.0) for a in (1.5, -0.5, 0.0)]
    log_probs = torch.tensor([log(r) - 2 for r, _ in cases], dtype=torch.float64, requires_grad=True)
    old = torch.full((len(cases),), -2.0, dtype=torch.float64)
    found = clipped_surrogate(log_probs, old, torch.tensor([a for _, a in cases]), low, high, dual)
    found.loss.sum().backward()
    for i, (r, a) in enumerate(cases):
        inside = min(max(r, 1 - low), 1 + high)
        pessimistic = min(r * a, inside * a)
        bounded = a < 0 and pessimistic < dual * a
        moves = pessimistic == r * a and not bounded
        assert float(found.loss.detach()[i]) == pytest.approx(-dual * a if bounded else -pessimistic), (r, a)
        assert float(log_probs.grad[i]) == pytest.approx(-r * a if moves else 0.0), (r, a)
        assert bool(found.clipped[i]) == (inside * a < r * a), (r, a)
        assert bool(found.dual_clipped[i]) == bounded, (r, a)
        assert float(found.approx_kl[i]) == pytest.approx(-log(r))
    # beyond e^20 nothing grows any more
    far = clipped_surrogate(torch.tensor([25.0]), torch.tensor([0.0]), torch.tensor([-1.0]), low, high, 1e12)
    assert float(far.loss) == pytest.approx(exp(20))


def test_zero_advantages_count_in_grpo_s_denominator(model_folder, make_rollout):
    """Doubling the batch by groups without a gradient halves GRPO's gradient, and leaves NSR-PreRL's alone."""
    folder = model_folder("llama-tied")
    one, two = make_rollout(1, 4, rewards=[1, 0, 0, 1]), make_rollout(2, 4, rewards=[1, 0, 0, 1, 1, 1, 1, 1])
    from dataclasses import replace

    twice = {name: getattr(one, name).repeat(2) for name in ("tokens", "log_probs", "lengths")}
    two = replace(two, prompts=one.prompts * 2, **twice)
    close(2 * gradient(attached(GRPO, folder), two), gradient(attached(GRPO, folder), one))
    close(gradient(attached(NSRPreRL, folder), two), gradient(attached(NSRPreRL, folder), one))


def test_importance_weights():
    from prerl_lightning.objectives.losses import importance_weights

    trainer, engine = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    one, other = torch.tensor([0, 0]), torch.tensor([0, 1])
    token = importance_weights(trainer, engine, one, 1, "token", 2.0)
    torch.testing.assert_close(token, torch.tensor([2.0, 0.36788]))
    for sequence, shift, expected in ((one, 0, [1, 1]), (one, 1, [0, 0]), (other, 0, [0, 0]), (other, 1, [0, 1])):
        found = importance_weights(trainer, engine - shift, sequence, 2, "sequence-mask", 2.0)
        assert found.tolist() == expected


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL])
def test_importance_sampling_reaches_the_gradient(model_folder, make_rollout, objective):
    """With every engine log-prob off by log 2, token weights of 2 double the gradient."""
    from dataclasses import replace

    folder, rollout = model_folder("llama-tied"), make_rollout()
    true = (
        attached(objective, folder)
        .make_passes(rollout)
        .log_probs("post-train", torch.ones(len(rollout), dtype=torch.bool))
    )
    shift = torch.tensor(2.0).log()
    corrected = attached(objective, folder, importance_sampling="token", importance_cap=3.0)
    plain = gradient(attached(objective, folder), rollout)
    close(gradient(corrected, replace(rollout, log_probs=true - shift)), 2 * plain, 1e-4)


def test_kl_to_the_reference(model_folder, make_rollout):
    """Zero at the anchor; away from it the penalty's gradient is the k3 estimator's, by autograd on a plain model."""
    folder = model_folder("llama-tied")
    rollout = make_rollout(2, 4, rewards=[0] * 8)  # no advantage: the penalty is all there is
    module = attached(GRPO, folder, kl_coefficient=0.5)
    assert float(gradient(module, rollout).abs().max()) < 1e-6
    before = [p.detach().clone() for p in module.policy.parameters()]
    with torch.no_grad():
        for i, p in enumerate(module.policy.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    moved = [p.detach().clone() for p in module.policy.parameters()]
    found = gradient(module, rollout)
    assert all(torch.equal(p, m) for p, m in zip(module.policy.parameters(), moved, strict=True))
    assert module.reference is not None
    assert all(torch.equal(s, b) for s, b in zip(module.reference.shards.values(), before, strict=True))

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for i, response in enumerate(rollout.responses):
        prompt = rollout.prompts[int(rollout.group_ids[i])].token_ids
        ids = torch.tensor([[*prompt, *response.token_ids]])
        of = [F.log_softmax(m(ids).logits[0, len(prompt) - 1 : -1] / 0.7, -1) for m in (module.policy.model, reference)]
        p, q = (t.gather(1, torch.tensor(response.token_ids).long()[:, None]) for t in of)
        total = total + ((q.detach() - p).exp() - 1 - (q.detach() - p)).sum()
    module.policy.zero_grad()
    (0.5 * total / rollout.lengths.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in module.policy.parameters()]).double()
    close(found, expected, 1e-4)


def moved(module):
    """The module's policy, moved away from its reference, and both as plain models in fp64."""
    reference, policy = (AutoModelForCausalLM.from_pretrained(module.model_name, dtype=torch.float64) for _ in range(2))
    module.anchored_reference()
    with torch.no_grad():
        for i, (p, q) in enumerate(zip(module.policy.model.parameters(), policy.parameters(), strict=True)):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            q.copy_(p)
    return policy, reference


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL, MixedRL])
def test_the_kl_penalty_is_added_once_in_the_first_term_s_space(model_folder, make_rollout, objective):
    """In fp64 from its definition: with log p(y given x) over all responses for GRPO and the mixed form, whose second
    term adds none; with log p(y) over the negatives alone for NSR-PreRL."""
    folder, rollout = model_folder("llama-tied"), make_rollout()
    options = {"pretrain_coefficient": 0.5} if objective is MixedRL else {}
    module = attached(objective, folder, kl_coefficient=0.3, **options)
    policy, reference = moved(module)
    plain = attached(objective, folder, **options)
    plain.policy = module.policy
    found = gradient(module, rollout) - gradient(plain, rollout)

    advantages = group_advantages(rollout.rewards, rollout.group_ids, "mean")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, response in enumerate(rollout.responses):
        context = rollout.prompts[int(rollout.group_ids[i])].token_ids
        if objective is NSRPreRL:
            if advantages[i] >= 0:
                continue
            context = (module.prefix_id,)
        ids = torch.tensor([[*context, *response.token_ids]])
        of = [F.log_softmax(m(ids).logits[0, len(context) - 1 : -1] / 0.7, -1) for m in (policy, reference)]
        p, q = (t.gather(1, torch.tensor(response.token_ids).long()[:, None]) for t in of)
        total = total + ((q.detach() - p).exp() - 1 - (q.detach() - p)).sum()
        count += len(response.token_ids)
    (0.3 * total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert float(expected.norm()) > 1e-3
    close(found, expected, 1e-3)  # a difference of two gradients in fp32


def test_masked_responses_stay_in_the_denominator(model_folder, make_rollout):
    """sequence-mask: the gradient is that of the others, over all tokens."""
    from dataclasses import replace

    folder, rollout = model_folder("llama-tied"), make_rollout(1, 4, rewards=[1, 0, 0, 1])
    true = attached(GRPO, folder).make_passes(rollout).log_probs("post-train", torch.ones(4, dtype=torch.bool))
    first = int(rollout.lengths[0])
    off = true.clone()
    off[:first] -= 5.0  # the engine's of one response, beyond any cap
    masked = gradient(attached(GRPO, folder, importance_sampling="sequence-mask"), replace(rollout, log_probs=off))
    whole = gradient(attached(GRPO, folder), rollout)
    alone = attached(GRPO, folder)
    update = alone.make_update(rollout)
    work = update.work(GRPO.terms[0])
    one = torch.tensor([True, False, False, False])
    update.backward([replace(work, own=one, selected=one)], torch.ones(4, dtype=torch.bool), on_policy=True)
    close(masked, whole - torch.cat([p.grad.flatten() for p in alone.policy.parameters()]).double())


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_spares_norms_and_biases(model_folder, everything):
    def decaying(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    options = {"decay_norms_and_biases": True} if everything else {}
    module = attached(GRPO, model_folder("qwen2-tied"), optimizer=decaying, **options)  # its attention has biases
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    optimizer = module.make_optimizer()
    for p in module.policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kinds = {True: 0, False: 0}
    for name, p in module.policy.named_parameters():
        vector = "norm" in name or name.endswith("bias")
        kinds[vector] += 1
        kept = 1.0 if vector and not everything else 0.95
        torch.testing.assert_close(p.detach(), kept * before[name])
    assert min(kinds.values()) >= 5


def test_learning_rate_schedules():
    from prerl_lightning.errors import InputError
    from prerl_lightning.objectives.schedule import learning_rate_factor as factor

    assert [factor("constant", s, 4, None) for s in (0, 3, 4, 99)] == [0.25, 1.0, 1.0, 1.0]
    assert [factor("linear", s, 0, 10) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert [factor("cosine", s, 0, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    # behind a warm-up the decay has the steps that are left, and beyond its end nothing
    assert [factor("linear", s, 2, 10) for s in (0, 1, 2, 4, 10, 12)] == [0.5, 1.0, 1.0, 0.75, 0.0, 0.0]
    assert [factor("cosine", s, 2, 10) for s in (2, 4, 6, 12)] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, 0], abs=1e-12
    )
    assert [factor("linear", s, 5, t) for s, t in ((5, 5), (5, 6), (6, 6))] == [1.0, 1.0, 0.0]
    with pytest.raises(InputError, match="max_steps"):
        factor("cosine", 5, 0, None)


def test_prefix_token():
    from transformers import PreTrainedTokenizerFast

    from prerl_lightning.errors import InputError
    from prerl_lightning.policy.model import load_tokenizer, prefix_token

    tokenizer = load_tokenizer("embedded-sums")
    assert prefix_token(tokenizer, None) == tokenizer.bos_token_id
    assert prefix_token(tokenizer, "#") == tokenizer("#")["input_ids"][1]
    assert prefix_token(tokenizer, 7) == 7
    for given, meant in (("5", 5), (5, 5), ('"5"', "5"), ('"#"', "#"), ("#", "#"), ("+5", "+5"), (None, None)):
        assert GRPO(prefix=given).prefix == meant
    for wrong, word in ((999, "outside"), ("12", "must be one")):
        with pytest.raises(InputError, match=word):
            prefix_token(tokenizer, wrong)
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="neither a BOS"):
        prefix_token(chat, None)
    chat.chat_template = "{% for m in messages %}wait{{ m['content'] }}{% endfor %}"
    assert prefix_token(chat, None) == tokenizer("w")["input_ids"][1]
