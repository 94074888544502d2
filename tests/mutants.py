"""Deliberate faults, one at a time, and which test notices. Run by hand, from anywhere; half an hour in all:

    python tests/mutants.py              # all of them
    python tests/mutants.py --list
    python tests/mutants.py --only biased-std --only stale-head

Each fault is made in a copy of the package and its tests, in a process of its own. One whose old text is not there
exactly once is refused, so that this list cannot fall behind the code. The exit status is the number of faults that no
test has noticed. What is left out: faults that only several ranks or a GPU could show, but for two of sharding.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch  # noqa: F401
import pytest
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 400  # a fault may make a run endless


class Fault(NamedTuple):
    """``old`` in the package's ``file`` becomes ``new``; ``tests``: pytest's arguments, with tests/ left out."""

    name: str
    file: str
    old: str
    new: str
    tests: str


PLAIN_LOOP = "test_step.py::test_a_step_is_that_of_a_plain_loop"
FORWARD = "test_update.py::test_log_probs_equal_a_plain_forward"
AGREE = "test_engine.py -k log_probs_agree_before_and_after_updates and llama-tied"
PACKED = "test_packing.py::test_packed_equals_alone"
CURSOR = "            self.cursor += 1\n"
SHARE = "            yield [self.prompts[i] for i in batch[self.rank * share : (self.rank + 1) * share]]\n"

FAULTS = [
    # ------------------------------------------------------------------ the step
    Fault(
        "temperature-left-out",
        "objectives/passes.py",
        "self.policy(batch, self.rollout.temperature, entropy)",
        "self.policy(batch, 1.0, entropy)",
        FORWARD,
    ),
    Fault("clipping-off", "objectives/update.py", "elif 0 < gradient_clip < norm:", "elif False:", PLAIN_LOOP),
    Fault(
        "non-finite-step-made",
        "objectives/update.py",
        "if not torch.isfinite(norm):",
        "if False:",
        "test_step.py::test_a_step_whose_gradient_is_not_finite_changes_nothing",
    ),
    Fault(
        "no-old-log-probs",
        "objectives/update.py",
        "many_updates = passes.batching.steps > 1",
        "many_updates = False",
        PLAIN_LOOP,
    ),
    Fault(
        "stale-rollout-taken",
        "objectives/base.py",
        "if rollout.policy_version != version:",
        "if False:",
        "test_step.py::test_a_rollout_of_other_weights_is_refused",
    ),
    Fault(
        "denominator-of-the-whole-rollout",
        "objectives/update.py",
        "counted = self.lengths[work.contributing & in_minibatch]",
        "counted = self.lengths[work.contributing]",
        PLAIN_LOOP,
    ),
    Fault(
        "a-penalty-a-term",
        "objectives/update.py",
        "first = term is self.terms[0]  # one",
        "first = True  # one",
        "test_update.py::test_the_kl_penalty_is_added_once_in_the_first_term_s_space",
    ),
    Fault(
        "no-penalty-without-advantage",
        "objectives/update.py",
        "if not kl and not entropy_coefficient:",
        "if True:",
        "test_update.py::test_kl_to_the_reference",
    ),
    Fault(
        "importance-of-log-p-y",
        "objectives/update.py",
        'passes.log_probs("post-train", own)\n            assert',
        "passes.log_probs(term.space, own)\n            assert",
        "test_update.py::test_importance_sampling_reaches_the_gradient",
    ),
    Fault(
        "mismatch-of-moved-weights",
        "objectives/update.py",
        "on_policy=step == 0",
        "on_policy=step < len(chunks)",
        "test_plain_runs.py::test_the_mismatch_is_measured_before_the_weights_move",
    ),
    Fault(
        "non-finite-log-probs-kept",
        "objectives/update.py",
        "contributing &= passes.sound & (self.lengths > 0)",
        "contributing &= self.lengths > 0",
        "test_agreement.py::test_responses_whose_log_probs_are_not_finite_are_left_out",
    ),
    Fault(
        "lr-of-the-run-s-step",
        "objectives/base.py",
        "first = version - self.first_step",
        "first = version",
        "test_plain_runs.py::test_each_life_has_its_own_steps_and_schedule",
    ),
    Fault(
        "ranks-not-reckoned",
        "objectives/update.py",
        "self.run_backward(loss * self.passes.world_size)",
        "self.run_backward(loss)",
        "test_sharded.py",
    ),
    Fault(
        "gathered-groups-fall-together",
        "objectives/passes.py",
        "group_ids.append(groups + len(prompts))",
        "group_ids.append(groups)",
        "test_sharded.py",
    ),
    # ------------------------------------------------------------------ base
    Fault(
        "schedule-ends-late",
        "objectives/base.py",
        "total = end - self.first_step",
        "total = end",
        "test_plain_runs.py::test_each_life_has_its_own_steps_and_schedule",
    ),
    Fault(
        "engine-s-old-weights-believed",
        "objectives/base.py",
        "self.data.engine.policy_version = None\n        for module in (self, *self.successors):",
        "for module in (self, *self.successors):",
        "test_plain_runs.py::test_an_engine_that_outlives_a_fit_gets_the_next_one_s_weights",
    ),
    Fault(
        "validated-with-old-weights",
        "objectives/base.py",
        'watchdog.mark("validation", self.trainer.global_step)\n        self.sync()',
        'watchdog.mark("validation", self.trainer.global_step)',
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "evaluations-pile-up",
        "objectives/base.py",
        "evaluations, self.evaluations = self.evaluations, Evaluations()",
        "evaluations = self.evaluations",
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "other-lives-resumed",
        "objectives/lives.py",
        'if found["schedule"] != _schedule(host):',
        "if False:",
        "test_plain_runs.py::test_a_resume_goes_on_in_its_life_with_its_reference",
    ),
    Fault(
        "decay-of-matrices-left-out",
        "objectives/optimizer.py",
        'groups[1]["weight_decay"] = 0.0',
        'groups[0]["weight_decay"] = 0.0',
        "test_update.py::test_weight_decay_spares_norms_and_biases",
    ),
    Fault(
        "each-life-s-end-not-measured",
        "objectives/run_state.py",
        "self.lives[1:]), self.trainer.max_steps]",
        "self.lives[2:]), self.trainer.max_steps]",
        "test_watchers.py::test_when_a_measurement_is_due",
    ),
    # ------------------------------------------------------------------ lives
    Fault(
        "life-ends-by-the-run-s-count",
        "objectives/lives.py",
        "(end - first) % rollout_steps",
        "end % rollout_steps",
        "test_health.py::test_what_cannot_be_is_refused_before_anything_is_started",
    ),
    Fault(
        "lives-end-one-too-early",
        "objectives/lives.py",
        "ends = [*steps[1:], None]",
        "ends = [*(s - 1 for s in steps[1:]), None]",
        "test_health.py::test_what_cannot_be_is_refused_before_anything_is_started",
    ),
    Fault(
        "life-cut-off-a-step-late",
        "objectives/lives.py",
        "candidates = range(step, following",
        "candidates = range(step + 1, following",
        "test_health.py::test_where_the_next_life_may_begin",
    ),
    Fault(
        "reborn-a-step-late",
        "callbacks/reincarnation.py",
        "trainer.global_step >= self.successor.first_step",
        "trainer.global_step > self.successor.first_step",
        "test_plain_runs.py::test_each_life_has_its_own_steps_and_schedule",
    ),
    Fault(
        "reset-carries",
        "callbacks/reincarnation.py",
        'carry=self.optimizer == "carry")',
        "carry=True)",
        "test_plain_runs.py::test_the_optimizer_s_state_at_a_rebirth",
    ),
    Fault(
        "carry-resets",
        "callbacks/reincarnation.py",
        "            if carry:\n",
        "            if not carry:\n",
        "test_plain_runs.py::test_the_optimizer_s_state_at_a_rebirth",
    ),
    Fault(
        "reference-forgotten-by-a-resume",
        "callbacks/reincarnation.py",
        "            self.successor.restore_life(lives)\n",
        "",
        "test_plain_runs.py::test_a_resume_goes_on_in_its_life_with_its_reference",
    ),
    Fault(
        "what-until-has-seen-lost-by-a-resume",
        "objectives/lives.py",
        '"ending": host.acting.ending and host.acting.ending.state_dict(),',
        '"ending": None,',
        "test_until.py::test_a_life_ends_at_the_same_step_whenever_the_run_is_killed",
    ),
    Fault(
        "until-sees-logged-steps-alone",
        "objectives/base.py",
        "lives.observe(self.host, metrics)  # of",
        "self.host.due(self.trainer.log_every_n_steps) and lives.observe(self.host, metrics)  # of",
        "test_until.py::test_a_life_ends_at_the_same_step_whenever_the_run_is_killed",
    ),
    # ------------------------------------------------------------------ validations
    Fault(
        "start-not-validated",
        "objectives/validations.py",
        "if trainer.global_step == 0 or self.due:",
        "if self.due:",
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "validation-owed-forgotten",
        "objectives/validations.py",
        'self.step, self.due = found["step"], found["due"]',
        'self.step, self.due = found["step"], False',
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "end-not-validated",
        "objectives/validations.py",
        "            trainer.should_stop = True  # Lightning",
        "            pass  # Lightning",
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "validated-twice",
        "objectives/validations.py",
        "trainer.should_stop) and self.step != step:",
        "trainer.should_stop):",
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    # ------------------------------------------------------------------ agreement
    Fault(
        "mismatch-a-prompt",
        "objectives/agreement.py",
        "/ passes.lengths.view(-1, len(prompts)).sum(1)",
        "/ len(prompts)",
        "test_plain_runs.py::test_the_mismatch_is_the_mean_distance_a_token",
    ),
    Fault(
        "mismatch-by-its-sign",
        "objectives/agreement.py",
        "apart = (trainer - passes.engine_log_probs).abs().cpu()",
        "apart = (trainer - passes.engine_log_probs).cpu()",
        "test_plain_runs.py::test_the_mismatch_is_the_mean_distance_a_token",
    ),
    Fault(
        "checked-once-for-all-fits",
        "objectives/base.py",
        "self.data.engine.policy_version = None\n        for module in (self, *self.successors):",
        "self.data.engine.policy_version = None\n        for module in ():",
        "test_plain_runs.py::test_an_engine_that_outlives_a_fit_gets_the_next_one_s_weights",
    ),
    Fault(
        "fp32-bound-for-16-bits",
        "objectives/agreement.py",
        "module.data.engine.weights_dtype == torch.float32 and str",
        "str",
        "test_plain_runs.py::test_the_mismatch_is_the_mean_distance_a_token",
    ),
    # ------------------------------------------------------------------ the engine
    Fault(
        "kept-prefix-cache",
        "rollout/vllm_engine.py",
        "        self.forget()\n        self.policy_version = policy_version",
        "        self.policy_version = policy_version",
        AGREE,
    ),
    Fault(
        "stale-head",
        "rollout/vllm_engine.py",
        'if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):',
        "if False:",
        AGREE,
    ),
    Fault(
        "log-probs-before-the-temperature",
        "rollout/vllm_engine.py",
        '"logprobs_mode": "processed_logprobs"',
        '"logprobs_mode": "raw_logprobs"',
        AGREE,
    ),
    Fault(
        "one-seed-for-all",
        "rollout/vllm_engine.py",
        "                seed=seed,\n",
        "                seed=seeds[0],\n",
        "test_engine.py -k same_seed_same_responses and llama-tied",
    ),
    Fault(
        "cut-and-ended-exchanged",
        "rollout/vllm_engine.py",
        'c.finish_reason == "length"',
        'c.finish_reason == "stop"',
        "test_engine.py -k how_responses_end and llama-tied",
    ),
    Fault(
        "the-host-s-luck-changed",
        "rollout/host.py",
        "        torch.set_rng_state(states[0])\n",
        "",
        "test_engine.py -k how_responses_end and llama-tied",
    ),
    Fault(
        "texts-without-their-prompt",
        "rollout/text.py",
        "list(prompt[-8:])",
        "list(prompt[:0])",
        "test_engine.py::test_a_text_stands_as_it_does_behind_its_prompt",
    ),
    # ------------------------------------------------------------------ rollouts
    Fault(
        "all-get-the-first-verdicts",
        "rollout/sampler.py",
        "verdicts[i] = [*islice",
        "verdicts[i] = verdicts[places[0]] or [*islice",
        "test_plain_runs.py::test_each_response_gets_its_own_reward",
    ),
    Fault(
        "greedy-is-a-sample",
        "rollout/sampler.py",
        "seeds, greedy=True) if greedy",
        "seeds) if greedy",
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "luck-by-place",
        "rollout/sampler.py",
        '[mixed_seed(seed, "val", p.row) for p in prompts]',
        '[mixed_seed(seed, "val", i) for i, p in enumerate(prompts)]',
        "test_plain_runs.py::test_validations_are_of_the_weights_of_their_step_each_alone",
    ),
    Fault(
        "cut-answers-look-whole",
        "rollout/sampler.py",
        '"truncated": response.truncated',
        '"truncated": False',
        "test_plain_runs.py::test_each_response_gets_its_own_reward",
    ),
    Fault(
        "the-same-luck-each-step",
        "data/module.py",
        '"train", step, first + i',
        '"train", first + i',
        "test_plain_runs.py::test_luck_depends_on_the_step_and_the_place_among_all_ranks",
    ),
    Fault(
        "the-same-luck-each-rank",
        "data/module.py",
        "(self.trainer.global_rank if self.trainer else 0) * n_prompts",
        "0",
        "test_plain_runs.py::test_luck_depends_on_the_step_and_the_place_among_all_ranks",
    ),
    Fault(
        "engine-s-version-not-asked",
        "data/module.py",
        "        if self.engine.policy_version != policy_version:\n            raise",
        "        if False:\n            raise",
        "test_step.py::test_an_engine_that_holds_other_weights_does_not_sample",
    ),
    Fault(
        "longest-prompt-without-room",
        "data/module.py",
        "longest = max_model_len - new",
        "longest = max_model_len",
        "test_plain_runs.py::test_a_prompt_leaves_room_for_its_response",
    ),
    # ------------------------------------------------------------------ rewards
    Fault(
        "failed-share-is-enough",
        "rewards/pool.py",
        "if len(failed) > most",
        "if len(failed) >= most",
        "test_pool.py::test_too_many_failures_stop_the_run",
    ),
    Fault(
        "first-death-blamed",
        "rewards/pool.py",
        "elif deaths == 2:",
        "elif deaths == 1:",
        "test_pool.py::test_a_worker_killed_from_outside_is_replaced_and_its_answer_verified",
    ),
    Fault(
        "deaths-of-the-answer-before",
        "rewards/pool.py",
        "set_result(verdict)\n                deaths = 0",
        "set_result(verdict)\n                deaths = min(deaths, 1)",
        "test_pool.py::test_the_death_of_one_answer_is_not_blamed_on_the_next",
    ),
    Fault(
        "hung-is-an-error",
        "rewards/pool.py",
        'HUNG = Verdict(0.0, None, "timeout"',
        'HUNG = Verdict(0.0, None, "error"',
        "test_pool.py -k verdicts",
    ),
    Fault(
        "certain-and-waited-for",
        "rewards/pool.py",
        "if len(failed) > most:",
        "if len(failed) > most and n == len(items):",
        "test_pool.py::test_a_batch_stops_as_soon_as_too_many_failures_are_certain",
    ),
    Fault(
        "workers-outlive-the-run",
        "rewards/worker.py",
        "    _end_with(int(sys.argv[2]))\n",
        "",
        "test_pool.py -k end_with_the_training_process",
    ),
    Fault(
        "closed-behind-what-waits",
        "rewards/pool.py",
        "                    process.kill()\n",
        "                    pass\n",
        "test_pool.py::test_a_pool_closes_without_waiting_for_what_hangs",
    ),
    Fault(
        "endless-rewards",
        "rewards/judging.py",
        "if not abs(score) <= LARGEST:",
        "if score != score:",
        "test_pool.py -k verdicts",
    ),
    Fault(
        "normalised-by-no-std",
        "rewards/shaping.py",
        "(score - center) / (spread + 1e-6)",
        "(score - center)",
        "test_reward_forms.py::test_gdpo_against_its_formula",
    ),
    Fault(
        "thought-that-nobody-opened",
        "rewards/shaping.py",
        "float(opened and bool(closed)",
        "float(bool(closed)",
        "test_reward_forms.py::test_a_thought_is_opened_by_its_response_or_by_the_prompt",
    ),
    Fault(
        "groups-torn-apart",
        "rewards/pool.py",
        "[entries] if self.at_once else",
        "[] if not entries else",
        "test_reward_forms.py::test_a_batch_is_whole_groups_and_fails_as_one",
    ),
    # ------------------------------------------------------------------ several sets, refilling
    Fault(
        "places-of-one-rank",
        "data/rollouts.py",
        "first = ranks.rank() * len(groups)",
        "first = 0",
        "test_mixture.py::test_two_ranks_sample_the_same",
    ),
    Fault(
        "each-epoch-of-a-set-alike",
        "data/mixture.py",
        "_generator(seed, number, turn)",
        "_generator(seed, number)",
        "test_mixture.py::test_each_step_has_about_its_share_of_each_set_and_each_set_its_own_epochs",
    ),
    # ------------------------------------------------------------------ ranks and sharding
    Fault(
        "ranks-out-of-order",
        "ranks.py",
        "[row for part in parts for row in part]",
        "[row for part in reversed(parts) for row in part]",
        "test_gpu_path.py::test_collectives_of_two_ranks",
    ),
    Fault(
        "reduced-elsewhere",
        "ranks.py",
        "    return there.to(tensor.device)",
        "    return tensor",
        "test_gpu_path.py -k collectives_of_two_ranks or without_a_cpu_backend",
    ),
    Fault(
        "sharded-in-fp32",
        "strategies.py",
        'if (precision or self.precision_plugin.precision) == "bf16-mixed":',
        "if False:",
        "test_sharded.py",
    ),
    Fault(
        "threads-of-the-moment",
        "rollout/host.py",
        "    if threads != _threads():\n        set_num_threads(_threads())\n",
        "",
        "test_engine.py -k whatever_the_number",
    ),
    Fault(
        "gradients-reduced-in-bf16",
        "strategies.py",
        "reduce_dtype=torch.float32",
        "reduce_dtype=torch.bfloat16",
        "test_sharded.py",
    ),
    Fault(
        "fsdp2-in-any-precision",
        "strategies.py",
        "if trainer.precision not in PRECISIONS:",
        "if False:",
        "test_gpu_path.py::test_precisions_that_sharding_does_not_know_are_refused",
    ),
    # ------------------------------------------------------------------ the policy
    Fault(
        "times-the-temperature",
        "policy/model.py",
        "self.logit_scale / temperature",
        "self.logit_scale * temperature",
        FORWARD,
    ),
    Fault(
        "training-mode",
        "policy/model.py",
        "return super().train(False)",
        "return super().train(mode)",
        "test_architectures.py -k right_or_refused and llama",
    ),
    Fault(
        "non-finite-folder-taken",
        "policy/model.py",
        "and not p.isfinite().all()]",
        "and p.isnan().all()]",
        "test_architectures.py -k damaged",
    ),
    Fault(
        "exported-in-fp32",
        "policy/model.py",
        "                tensor = tensor.to(dtype)\n",
        "                pass\n",
        "test_saving.py::test_an_export_has_the_dtype_asked_for",
    ),
    Fault(
        "eos-for-bos",
        "policy/model.py",
        "return int(tokenizer.bos_token_id)",
        "return int(tokenizer.eos_token_id)",
        "test_update.py::test_prefix_token",
    ),
    Fault(
        "scale-one-way",
        "policy/probe.py",
        "scales += [float(value), 1 / value]",
        "scales += [float(value)]",
        "test_architectures.py -k right_or_refused and granite",
    ),
    Fault(
        "one-sequence-probed",
        "policy/probe.py",
        "log_probs = logits[len(family.context) - 1 : -1]",
        "log_probs = logits[len(family.context) : ]",
        "test_architectures.py -k right_or_refused and llama",
    ),
    Fault(
        "windows-packed",
        "policy/probe.py",
        'if not flash and (kinds - {"full_attention"} or windows):',
        'if not flash and kinds - {"full_attention"}:',
        "test_packing.py::test_a_model_whose_attention_packs_cannot_express_is_padded",
    ),
    Fault(
        "short-factors-always",
        "policy/probe.py",
        "rotary(torch.zeros(1), torch.tensor([[limit]]))",
        "rotary(torch.zeros(1), torch.tensor([[0]]))",
        "test_architectures.py -k longest_sequence_beside",
    ),
    Fault(
        "draws-not-compared",
        "policy/probe.py",
        "if worst := far(own, again):",
        "if worst := far(own, own):",
        "test_architectures.py -k draws",
    ),
    Fault(
        "reference-follows",
        "policy/reference.py",
        "ranks.local(p.detach()).clone()",
        "ranks.local(p.detach())",
        "test_update.py::test_kl_to_the_reference",
    ),
    Fault(
        "policy-saved-for-reference",
        "policy/reference.py",
        ".detach().cpu().clone()",
        ".detach().cpu()",
        "test_plain_runs.py::test_a_resume_goes_on_in_its_life_with_its_reference",
    ),
    Fault(
        "reference-not-loaded",
        "policy/reference.py",
        "copy_(ranks.local(ranks.held_as(state[name], parameter)))",
        "copy_(self.shards[name])",
        "test_plain_runs.py::test_a_resume_goes_on_in_its_life_with_its_reference",
    ),
    Fault(
        "reference-left-in-place",
        "policy/reference.py",
        "        finally:\n            self._exchange(policy)",
        "        finally:\n            pass",
        "test_update.py::test_kl_to_the_reference",
    ),
    # ------------------------------------------------------------------ packs
    Fault(
        "shared-positions",
        "policy/packing.py",
        "own = add([inputs], prompt.length, prompt)",
        "own = add([inputs], 0, prompt)",
        PACKED,
    ),
    Fault(
        "mask-one-token-too-wide",
        "policy/attention.py",
        "dtype=torch.bool).tril(parent.length)",
        "dtype=torch.bool).tril(parent.length + 1)",
        PACKED,
    ),
    Fault(
        "predictors-one-late",
        "policy/packing.py",
        "b * width + len(context) - 1, b * width + end",
        "b * width + len(context), b * width + end + 1",
        "test_packing.py::test_packed_equals_alone",
    ),
    Fault(
        "parents-gradient-lost",
        "policy/attention.py",
        "            by_tokens.index_add_(0, parents, gradients[0][-len(parents) :])\n",
        "            pass\n",
        "test_packing.py -k gradient_of_a_pack and GRPO",
    ),
    Fault(
        "keys-not-reckoned",
        "policy/packing.py",
        "return self.n_tokens + copies",
        "return self.n_tokens",
        "test_gpu_path.py::test_packs_hold_no_more_keys_than_memory_was_reckoned_with",
    ),
    # ------------------------------------------------------------------ pure functions
    Fault(
        "nsr-s-sign",
        "objectives/advantages.py",
        "return advantages < 0",
        "return advantages > 0",
        "test_update.py::test_nsr_prerl_equals_a_plain_loop_in_fp64",
    ),
    Fault(
        "biased-std",
        "objectives/advantages.py",
        "advantages**2) / (count - 1).clamp(min=1)",
        "advantages**2) / count",
        "test_update.py::test_advantages_are_those_of_each_group_alone",
    ),
    Fault(
        "rounding-blown-up",
        "objectives/advantages.py",
        "(advantages.abs() <= rounding[index])",
        "(advantages.abs() < 0.0)",
        "test_update.py::test_rewards_whose_float_mean_misses_them_have_no_advantage",
    ),
    Fault(
        "clip-bounds-exchanged",
        "objectives/losses.py",
        "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
        "test_update.py::test_the_surrogate_token_by_token",
    ),
    Fault(
        "maximum-for-minimum",
        "objectives/losses.py",
        "torch.minimum(surrogate, bound)",
        "torch.maximum(surrogate, bound)",
        PLAIN_LOOP,
    ),
    Fault(
        "k3-upside-down",
        "objectives/losses.py",
        "return log_ratio.clamp(-20.0, 20.0).exp() - 1 - log_ratio",
        "return (-log_ratio).clamp(-20.0, 20.0).exp() - 1 + log_ratio",
        "test_update.py::test_kl_to_the_reference",
    ),
    Fault(
        "k2-twice",
        "objectives/losses.py",
        "return 0.5 * log_ratio**2",
        "return log_ratio**2",
        "test_objectives.py::test_the_kl_in_the_loss_by_each_estimator",
    ),
    Fault(
        "left-out-of-one-too-many",
        "objectives/advantages.py",
        "others = (count - 1).clamp(min=1)",
        "others = count",
        "test_objectives.py -k formula and rloo",
    ),
    Fault(
        "clip-of-the-tokens",
        "objectives/surrogates.py",
        "ratio = tokens.response_means(tokens.log_probs - tokens.old_log_probs).clamp(-20.0, 20.0).exp()",
        "ratio = tokens.log_ratios.exp()",
        "test_objectives.py -k formula and gspo",
    ),
    Fault(
        "weight-with-a-gradient",
        "objectives/surrogates.py",
        "ratio = tokens.log_ratios.detach().exp()",
        "ratio = tokens.log_ratios.exp()",
        "test_objectives.py -k formula and cispo",
    ),
    Fault(
        "gae-without-lambda",
        "objectives/advantages.py",
        "gamma * gae_lambda * following",
        "gamma * following",
        "test_ppo.py::test_gae_is_its_sum",
    ),
    Fault(
        "penalty-by-response",
        "objectives/values.py",
        "rewards, some = -self.penalties, self.lengths > 0",
        "rewards, some = -self.penalties.mean() + 0 * self.penalties, self.lengths > 0",
        "test_ppo.py::test_an_update_is_that_of_a_plain_loop",
    ),
    Fault(
        "values-of-one-rank",
        "objectives/values.py",
        "return ranks.all_reduce(found.cpu())",
        "return found.cpu()",
        "test_ppo.py::test_two_ranks_learn_what_one_does",
    ),
    Fault(
        "value-gradient-of-one-rank",
        "objectives/values.py",
        "if ranks.world_size() > 1 and not isinstance(gradient, DTensor):",
        "if False:",
        "test_ppo.py::test_two_ranks_learn_what_one_does",
    ),
    Fault(
        "value-moments-forgotten",
        "objectives/values.py",
        'self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})',
        "pass",
        "test_ppo.py::test_resumed_in_mid_life_it_goes_on",
    ),
    Fault(
        "steps-of-the-run",
        "objectives/base.py",
        "step = self.trainer.global_step - self.first_step",
        "step = self.trainer.global_step",
        "test_objectives.py::test_schedules_count_the_steps_of_their_life_and_resume_exactly",
    ),
    Fault(
        "entropy-s-coefficient-forgotten",
        "objectives/objective.py",
        'self.entropy_state = state.get("entropy_coefficient", 0.0)',
        "self.entropy_state = 0.0",
        "test_objectives.py::test_schedules_count_the_steps_of_their_life_and_resume_exactly",
    ),
    Fault(
        "entropy-s-slope-less-its-mean",
        "policy/head.py",
        "slopes = (log_p + entropies[:, None])",
        "slopes = (log_p + 0 * entropies[:, None])",
        "test_head.py::test_entropy_and_its_gradient_equal_fp64",
    ),
    Fault(
        "mask-above-alone",
        "objectives/losses.py",
        "(ratios.abs() <= math.log(cap))",
        "(ratios <= math.log(cap))",
        "test_update.py::test_importance_weights",
    ),
    Fault(
        "warm-up-from-nothing",
        "objectives/schedule.py",
        "return (step + 1) / warmup_steps",
        "return step / warmup_steps",
        "test_update.py::test_learning_rate_schedules",
    ),
    Fault(
        "decay-with-its-warm-up",
        "objectives/schedule.py",
        "(step - warmup_steps) / max(1, total_steps - warmup_steps)",
        "step / max(1, total_steps)",
        "test_update.py::test_learning_rate_schedules",
    ),
    Fault(
        "pass-of-the-right-ones",
        "metrics/evaluation.py",
        "comb(n - correct, k) / comb(n, k)",
        "comb(n - correct, k) / n**k",
        "test_evaluation.py -k pass_at_k",
    ),
    Fault(
        "greedy-by-arrival",
        "metrics/evaluation.py",
        "dim_zero_cat(self.greedy)[dim_zero_cat(self.greedy_rows).argsort()]",
        "dim_zero_cat(self.greedy)",
        "test_evaluation.py::test_order_changes_no_digit_of_any_interval",
    ),
    Fault(
        "partial-credit-is-right",
        "metrics/evaluation.py",
        "return rewards > 1 - 1e-6",
        "return rewards > 0",
        "test_watchers.py::test_right_is_one_thing",
    ),
    Fault(
        "mean-of-means",
        "metrics/sums.py",
        "        self.counts[i] += count\n",
        "        self.counts[i] += 1\n",
        "test_update.py::test_entropy_is_that_of_plain_forwards",
    ),
    # ------------------------------------------------------------------ the order of prompts
    Fault(
        "cursor-behind-the-yield",
        "data/loader.py",
        CURSOR + SHARE,
        SHARE + CURSOR,
        "test_data.py::test_the_cursor_goes_on_where_it_was",
    ),
    Fault(
        "each-epoch-alike",
        "data/loader.py",
        "seed * 1_000_003 + epoch",
        "seed * 1_000_003",
        "test_data.py::test_the_cursor_goes_on_where_it_was",
    ),
    Fault(
        "every-rank-the-whole-batch",
        "data/loader.py",
        "share = -(-len(batch) // self.world_size)",
        "share = len(batch)",
        "test_data.py::test_ranks_share_each_global_batch",
    ),
    # ------------------------------------------------------------------ checkpoints
    Fault(
        "written-in-its-place",
        "checkpoints.py",
        'path, self.problem = Path(path), ""\n        new = _beside(path, "new")',
        'path, self.problem = Path(path), ""\n        new = path',
        "test_saving.py::test_a_full_disk_leaves_the_good_checkpoint",
    ),
    Fault(
        "the-worst-kept",
        "callbacks/saving.py",
        'reverse=mode == "max")',
        'reverse=mode == "min")',
        "test_saving.py::test_a_resumed_run_goes_on_comparing",
    ),
    Fault(
        "saved-before-its-validation",
        "callbacks/saving.py",
        "self._defer_save_until_validation = validation_follows(trainer)",
        "self._defer_save_until_validation = False",
        "test_saving.py::test_one_write_a_save_that_is_judged",
    ),
    Fault(
        "the-end-not-saved",
        "callbacks/saving.py",
        "return trainer.global_step not in written and",
        "return trainer.global_step < 0 and",
        "test_saving.py::test_one_write_a_save",
    ),
    Fault(
        "unvalidated-steps-judged",
        "callbacks/saving.py",
        "        if validated or not self.held_out:\n",
        "        if True:\n",
        "test_saving.py::test_only_validated_steps_are_judged_by_a_held_out_score",
    ),
    Fault(
        "oldest-for-newest",
        "resume.py",
        "p.stat().st_mtime, reverse=True)",
        "p.stat().st_mtime)",
        "test_resume.py::test_last_is_the_newest_file",
    ),
    Fault(
        "lives-in-the-order-written",
        "resume.py",
        '    lives.sort(key=lambda life: life["at_step"])\n',
        "",
        "test_resume.py::test_lives_are_compared_by_their_steps",
    ),
    Fault(
        "model-may-differ",
        "resume.py",
        'BOUND = ("seed_everything", "model", "data",',
        'BOUND = ("seed_everything", "data",',
        "test_resume.py -k each_of_these_alone",
    ),
    # ------------------------------------------------------------------ health
    Fault(
        "skips-not-in-a-row",
        "callbacks/health.py",
        "0 if skipped < acting.batching.steps else self.skipped_in_a_row + not_finite",
        "self.skipped_in_a_row + not_finite",
        "test_plain_runs.py::test_skipped_steps_are_counted_in_a_row",
    ),
    Fault(
        "droughts-not-in-a-row",
        "callbacks/health.py",
        "            self.drought = Drought()\n        else",
        "            pass\n        else",
        "test_plain_runs.py::test_no_signal_is_counted_in_a_row",
    ),
    Fault(
        "compared-with-the-resumed",
        "callbacks/health.py",
        'self.at_start, self.warnings = state_dict["at_start"], state_dict.get("warnings", {})',
        'self.warnings = state_dict.get("warnings", {})',
        "test_plain_runs.py::test_a_resume_goes_on_in_its_life_with_its_reference",
    ),
    Fault(
        "infinity-is-finite",
        "policy/model.py",
        "~torch.isfinite(ranks.full(total))",
        "torch.isnan(ranks.full(total))",
        "test_saving.py::test_one_weight_that_is_not_finite_is_seen",
    ),
]


def faulty(text: str, fault: Fault) -> str:
    """The file with the fault in it."""
    if (found := text.count(fault.old)) != 1:
        sys.exit(f"{fault.name}: the old text is {found} times in prerl_lightning/{fault.file}; it has to be once.")
    return text.replace(fault.old, fault.new)


def run(fault: Fault, copy: Path) -> tuple[str, float]:
    """The test that fails first, or what else happens, and the seconds."""
    file = copy / "prerl_lightning" / fault.file
    sound = file.read_text()
    file.write_text(faulty(sound, fault))
    start = time.monotonic()
    try:
        status, said = pytest_status(fault.tests, copy)
    finally:
        file.write_text(sound)
    failed = [line.split(" - ")[0].split(" ", 1)[1] for line in said if line.startswith(("FAILED ", "ERROR "))]
    if status is None:
        found = f"no end within {SECONDS} s"
    elif status == 0:
        found = "NOT NOTICED"
    elif status == 1 and failed:
        found = failed[0].removeprefix("tests/")
    else:  # nothing was collected, say
        sys.exit(f"{fault.name}: pytest's exit status is {status}:\n" + "\n".join(said[-40:]))
    return found, time.monotonic() - start


def pytest_status(tests: str, copy: Path) -> tuple[int | None, list[str]]:
    """Exit status, None after `SECONDS`, and output of the ``tests`` in ``copy``: in a fork of this process, which has
    imported already what takes long and is not ours."""
    words, _, chosen = tests.partition(" -k ")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", *(["-k", chosen] if chosen else [])]
    log = copy / "output"
    child = os.fork()
    if not child:
        os.setsid()  # what the tests start is to end with them
        os.chdir(copy)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[0] = str(copy)
        status = 70
        try:
            status = int(pytest.main([*arguments, *(f"tests/{word}" for word in words.split())]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    done, status = 0, 0
    while not done and time.monotonic() < end:
        time.sleep(0.05)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if done else None, log.read_text(errors="replace").splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[f.name for f in FAULTS], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="names, files and tests, and run nothing")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.only or f.name in options.only]
    for fault in chosen:
        faulty((ROOT / "prerl_lightning" / fault.file).read_text(), fault)
        if options.list:
            print(f"{fault.name} | {fault.file} | {fault.tests}")
    if options.list:
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prerl_lightning", "tests", "configs", "docs", "README.md", "pyproject.toml"):
            whole = ROOT / name
            (shutil.copytree if whole.is_dir() else shutil.copy)(whole, Path(folder) / name)
        print("fault | noticed by | seconds", flush=True)
        for fault in chosen:
            found, seconds = run(fault, Path(folder))
            missed += found == "NOT NOTICED"
            print(f"{fault.name} | {found} | {seconds:.0f}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
