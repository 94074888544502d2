"""Gradient alignment against a plain double backward through Hugging Face's forward; sketches against the whole."""

import gc
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from trainers import quiet_trainer
from transformers import AutoModelForCausalLM

from prerl_lightning.callbacks.alignment import GradientAlignment, chosen
from prerl_lightning.callbacks.weights import weight_sketch
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.alignment import GROUPS, GradientComparison, comparison_bytes, dot, layer_groups
from prerl_lightning.metrics.sketch import SIZE, Sketch, usable_size
from prerl_lightning.objectives import GRPO
from prerl_lightning.objectives.advantages import group_advantages
from prerl_lightning.policy.model import Policy, load_tokenizer, model_path

PREFIX = 1


def plain_gradients(model, context, ids, temperature, tokens=slice(None)):
    model.zero_grad()
    inputs = torch.tensor([[*context, *ids]])
    logits = model(inputs).logits[0, len(context) - 1 : -1] / temperature
    log_probs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids).long()[:, None])[:, 0]
    log_prob = log_probs[tokens].sum()
    log_prob.backward()
    return float(log_prob.detach()), {n: p.grad.clone().double() for n, p in model.named_parameters()}


def whole(gradient):
    return torch.cat([g.flatten() for g in gradient.values()])


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_plain_double_backward(model_folder, make_rollout, shape):
    folder = model_folder(shape)
    policy = Policy.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rollout = make_rollout()
    advantages = group_advantages(rollout.rewards, rollout.group_ids, "mean")
    numbers = chosen(rollout, advantages.sign(), 6)
    comparison = GradientComparison(policy)
    assert comparison.sketch == 0
    each, of_policy = comparison.responses(rollout, numbers, dict(enumerate(advantages.tolist())), PREFIX)
    sums = [0.0, 0.0]
    groups = layer_groups(policy)
    assert [a.number for a in each] == numbers
    for found in each:
        ids = rollout.responses[found.number].token_ids
        prompt = rollout.prompts[int(rollout.group_ids[found.number])].token_ids
        log_prob, a = plain_gradients(model, prompt, ids, rollout.temperature)
        marginal, b = plain_gradients(model, (PREFIX,), ids, rollout.temperature)
        assert found.log_prob == pytest.approx(log_prob, rel=1e-5)
        assert found.marginal_log_prob == pytest.approx(marginal, rel=1e-5)
        product = float(whole(a) @ whole(b))
        scale = float(whole(a).norm() * whole(b).norm())
        assert found.products.inner_product == pytest.approx(product, abs=1e-4 * scale)
        assert found.products.cosine == pytest.approx(product / scale, abs=1e-4)
        assert float(found.products.aa.sum()) == pytest.approx(float(whole(a).norm()) ** 2, rel=1e-4)
        for group, cosine in found.products.by_group.items():
            some = [n for n in a if groups["model." + n] == group]
            x, y = (torch.cat([g[n].flatten() for n in some]) for g in (a, b))
            assert cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-4), group
        weight = float(advantages[found.number])
        sums = [s + weight * whole(g) for s, g in zip(sums, (a, b), strict=True)]
    expected = float(sums[0] @ sums[1] / (sums[0].norm() * sums[1].norm()))
    assert of_policy.cosine == pytest.approx(expected, abs=1e-4)
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("sketch", [0, 65_537])
def test_parts_equal_a_plain_double_backward(model_folder, make_rollout, sketch):
    """In fp64; by position and by probability, and what the parts of a position add up to is the whole."""
    folder = model_folder("llama-untied")
    policy, model = Policy.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rollout = make_rollout()
    numbers = [int(rollout.lengths.argmax()), int(rollout.lengths.argsort()[2])]
    weights = dict.fromkeys(numbers, 0.5)
    comparison = GradientComparison(policy, sketch)
    each, of_policy = comparison.responses(rollout, numbers, weights, PREFIX, bins=4)
    plain, plain_policy = comparison.responses(rollout, numbers, weights, PREFIX)
    assert of_policy.cosine == pytest.approx(plain_policy.cosine, abs=1e-5)
    bound, seen = 1e-4 if not sketch else 5 * math.sqrt(2 / sketch), set()
    for found, whole_one in zip(each, plain, strict=True):
        assert found.products.cosine == pytest.approx(whole_one.products.cosine, abs=1e-5)
        assert found.log_prob == pytest.approx(whole_one.log_prob, rel=1e-5)
        assert (whole_one.by_position, whole_one.by_probability) == ({}, {})
        ids = rollout.responses[found.number].token_ids
        prompt = rollout.prompts[int(rollout.group_ids[found.number])].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / rollout.temperature
        p = logits.softmax(-1)[range(len(ids)), ids.tolist()].tolist()
        of_position = {f"{q + 1}_of_4": [t for t in range(len(ids)) if t * 4 // len(ids) == q] for q in range(4)}
        edges = [0, 0.5, 0.9, 0.99, 1]
        of_probability = {
            f"{a}_to_{b}": [t for t, x in enumerate(p) if a <= x < b] for a, b in itertools.pairwise(edges)
        }
        for parts, expected in ((found.by_position, of_position), (found.by_probability, of_probability)):
            expected = {name: tokens for name, tokens in expected.items() if tokens}
            assert {name: part.tokens for name, part in parts.items()} == {k: len(v) for k, v in expected.items()}
            for name, tokens in expected.items():
                gradients = [
                    whole(plain_gradients(model, c, ids, rollout.temperature, tokens)[1]) for c in (prompt, (PREFIX,))
                ]
                product, norms = gradients[0] @ gradients[1], gradients[0].norm() * gradients[1].norm()
                assert parts[name].products.cosine == pytest.approx(float(product / norms), abs=bound), name
                assert parts[name].products.inner_product == pytest.approx(float(product), abs=bound * float(norms))
                seen.add(name)
    assert len(seen) >= 6


@pytest.mark.parametrize("bins", [0, 3])
def test_so_many_gradients_are_held_at_a_time(model_folder, make_rollout, monkeypatch, bins):
    """As memory is reckoned with, those of responses and stretches gone by not among them."""
    policy, rollout, most = Policy.from_pretrained(model_folder("llama-untied")), make_rollout(), 0
    shape, take = policy.model.lm_head.weight.shape, GradientComparison._gradient

    def held():
        return {x.data_ptr() for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == shape}

    def counting(*args):
        nonlocal most
        found = take(*args)
        most = max(most, len(held() - before) / 2)  # the embedding has the same
        return found

    gc.collect()
    before = held()  # other tests'
    monkeypatch.setattr(GradientComparison, "_gradient", counting)
    numbers = rollout.lengths.argsort()[-3:].tolist()
    GradientComparison(policy).responses(rollout, numbers, dict.fromkeys(numbers, 1.0), PREFIX, bins=bins)
    assert most == comparison_bytes(1, 0, bins) / 4


def test_a_part_without_a_gradient_is_left_out(model_folder, make_rollout):
    """A token of probability 1 has none, in fp32: a cosine of it would be NaN, which is no JSON."""
    policy = Policy.from_pretrained(model_folder("llama-untied"))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1e4)
        rollout = make_rollout(n_prompts=1, group_size=1)
        ids = torch.tensor([rollout.prompts[0].token_ids])
        best = int(policy.model(ids).logits[0, -1].argmax())
    rollout = replace(rollout, tokens=torch.tensor([best], dtype=torch.int32), lengths=torch.tensor([1]))
    (found,), _ = GradientComparison(policy).responses(rollout, [0], {0: 1.0}, PREFIX, bins=2)
    assert (found.by_position, found.by_probability) == ({}, {})
    assert found.log_prob == 0


def test_layer_groups_cover_the_model_in_order(model_folder):
    policy = Policy.from_pretrained(model_folder("llama-untied"))
    groups = layer_groups(policy)
    assert set(groups) == {name for name, _ in policy.named_parameters()}
    assert groups["model.model.embed_tokens.weight"] == "embedding"
    assert groups["model.lm_head.weight"] == groups["model.model.norm.weight"] == "head"
    assert groups["model.model.layers.0.mlp.up_proj.weight"] == "first"
    assert set(groups.values()) <= set(GROUPS)


def test_sketched_alignment_stays_within_the_error_it_states(model_folder, make_rollout):
    policy = Policy.from_pretrained(model_folder("llama-untied"))
    rollout = make_rollout()
    weights = dict.fromkeys(range(20), 1.0)
    numbers = [i for i, n in enumerate(rollout.lengths.tolist()) if n][:8]
    exact, exact_policy = GradientComparison(policy, 0).responses(rollout, numbers, weights, PREFIX)
    rough, rough_policy = GradientComparison(policy, 8191).responses(rollout, numbers, weights, PREFIX)
    bound = math.sqrt(2 / 8191)
    errors = [r.products.cosine - e.products.cosine for r, e in zip(rough, exact, strict=True)]
    assert max(map(abs, errors)) < 5 * bound
    assert rough_policy.cosine == pytest.approx(exact_policy.cosine, abs=5 * bound)
    assert any(errors)  # it was sketched


def test_sketches_of_inner_products_and_norms():
    """Over many pairs: unbiased, with the standard deviation that the module states."""
    size, generator = 1021, torch.Generator().manual_seed(1)
    inner, norms = [], []
    for _ in range(200):
        a, b = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
        b = b + 0.5 * a
        sketches = [Sketch(size), Sketch(size)]
        start = int(torch.randint(0, 10_000_000, (1,), generator=generator))
        for sketch, vector in zip(sketches, (a, b), strict=True):
            sketch.add(vector, start)
        inner.append(float((sketches[0].sums @ sketches[1].sums - a @ b) / (a.norm() * b.norm())))
        norms.append(float(sketches[0].sums.norm() / a.norm() - 1))
    inner, norms = torch.tensor(inner), torch.tensor(norms)
    assert float(inner.std()) <= 1.15 * math.sqrt(2 / size)
    assert float(norms.std()) <= 1.15 * math.sqrt(1 / (2 * size))
    for errors in (inner, norms):
        assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(200)


def test_columns_of_a_matrix_do_not_pile_up_in_buckets():
    """One column with most of the weight, in a width that divides powers of two."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(30):
        a, b = torch.randn(2, 4096, 256, generator=generator, dtype=torch.float64)
        a[:, 7] *= 50
        b[:, 7] *= 50
        sketches = [Sketch(8191), Sketch(8191)]
        for sketch, matrix in zip(sketches, (a, b), strict=True):
            sketch.add(matrix, 0)
        errors.append(float((sketches[0].sums @ sketches[1].sums - (a * b).sum()) / (a.norm() * b.norm())))
    assert float(torch.tensor(errors).std()) <= 1.5 * math.sqrt(2 / 8191)
    assert [usable_size(n) for n in (1, 65_536, 65_537, 499_979, 10**9)] == [2, 65_537, 65_537, 499_979, 499_979]


def test_dot_products_of_many_millions():
    a = torch.rand(20_000_000, generator=torch.Generator().manual_seed(0))
    exact = sum(float(p.double() @ p.double()) for p in a.split(1_000_000))
    assert dot(a, a) == pytest.approx(exact, rel=1e-6)
    assert dot(torch.zeros(0), torch.zeros(0)) == 0


def test_a_sketch_does_not_depend_on_the_pieces():
    vector = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    whole_one, pieces = Sketch(), Sketch()
    whole_one.add(vector, 7)
    for start in range(0, len(vector), 333_333):
        pieces.add(vector[start : start + 333_333], 7 + start)
    torch.testing.assert_close(whole_one.sums, pieces.sums, rtol=1e-9, atol=1e-9)
    expected = torch.zeros(SIZE, dtype=torch.float64)
    from prerl_lightning.metrics.sketch import SIGNS, _signs

    index = torch.arange(7, 7 + len(vector))
    expected.index_add_(0, index % SIZE, vector.double() * _signs("cpu")[index % SIGNS])
    torch.testing.assert_close(whole_one.sums, expected, rtol=1e-9, atol=1e-9)


def test_weight_change_by_sketches(model_folder):
    policy = Policy.from_pretrained(model_folder("llama-tied"))
    before = weight_sketch(policy)
    norm = torch.cat([p.detach().flatten() for p in policy.parameters()]).norm()
    assert float(before.norm()) == pytest.approx(float(norm), rel=0.02)
    moved = 0.0
    with torch.no_grad():
        for p in policy.parameters():
            step = 1e-5 * torch.randn_like(p)
            old = p.clone()
            p += step
            moved += float((p - old).double().square().sum())
    assert float((weight_sketch(policy) - before).norm()) == pytest.approx(math.sqrt(moved), rel=0.02)


def test_half_of_the_chosen_have_either_sign(make_rollout):
    rollout = make_rollout(rewards=[1.0, 0, 0, 0] * 5)
    signs = group_advantages(rollout.rewards, rollout.group_ids, "mean").sign()
    numbers = chosen(rollout, signs, 8)
    assert len(set(numbers)) == 8
    assert sum(int(signs[n]) for n in numbers) == 0
    assert numbers == chosen(rollout, signs, 8)
    equal = make_rollout(rewards=[1.0] * 20)
    assert len(chosen(equal, torch.zeros(20), 8)) == 8
    assert len(chosen(equal, torch.zeros(20), 99)) == 20


def test_a_tokenizer_without_a_first_token_is_refused_at_the_start(tmp_path):
    """GRPO itself needs none, and would train until the first measurement."""
    for file in Path(model_path("embedded")).iterdir():
        if file.suffix == ".json" and not file.name.startswith("special"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("bos_token", "chat_template")}
    config.write_text(json.dumps(kept))
    module, tokenizer = GRPO(model=tmp_path), load_tokenizer(str(tmp_path))
    measured, left_out = (quiet_trainer(callbacks=[GradientAlignment(n)]) for n in (50, 0))
    with pytest.raises(
        InputError, match=r"neither a BOS token .* model\.init_args\.prefix .* alignment\.every_n_steps: 0"
    ):
        module.check_prefixes(tokenizer, measured)
    module.check_prefixes(tokenizer, left_out)
    module.check_prefixes(tokenizer, None)  # an evaluation measures no gradients
    GRPO(model=tmp_path, prefix=3).check_prefixes(tokenizer, measured)
