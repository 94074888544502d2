"""Bad input, case by case: exit status 2, before the engine starts, nothing left behind, and the last line of stderr is
`prerl: error: KEY: what is wrong, the mend`."""

import json
import os
import re
import shlex

import pytest
from commands import environment_kept
from safetensors.torch import load_file, save_file

from prerl_lightning import hub
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import ASSETS, load_config

BASE = """
model: {class_path: GRPO, init_args: {model: embedded, lr: 1.0e-3}}
data:
  train: {class_path: CountdownProblems, init_args: {split: train, size: 16}}
  val: {class_path: CountdownProblems, init_args: {split: held_out, size: 8}}
  prompts_per_step: 4
  sampling: {group_size: 4, max_new_tokens: 32}
  verification: {workers: 0}
  engine: {class_path: VLLMEngine, init_args: {max_model_len: 64}}
trainer: {max_steps: 4, accelerator: cpu}
"""
FILES = {
    "base.yaml": BASE,
    "empty.yaml": "",
    "list.yaml": "- 1\n- 2\n",
    "broken.yaml": "model: {a: [\n",
    "twice.yaml": "trainer: {max_steps: 3}\ndata: {prompts_per_step: 2}\ntrainer: {accelerator: cpu}\n",
    "twice_below.yaml": "trainer:\n  max_steps: 3\n  max_steps: 5\n",
    "file": "x",
    "empty.jsonl": "",
    "data/train.csv": "question,answer,note\n1,2,3\n",
    "data.json": json.dumps([{"prompt": "2,3,4>9?", "answer": "9"}]),
    "problems.json": json.dumps({"class_path": "CountdownProblems", "init_args": {"split": "train", "size": 16}}),
    "array.jsonl": "[1, 2]\n",
    "rewards_here.py": "number = 3\n",
    "objectives_here.py": "from prerl_lightning.objectives import GRPO\n\n"
    "class Hooked(GRPO):\n    def on_train_batch_start(self, *_):\n        pass\n\n"
    "class Stepping(GRPO):\n    def optimizer_step(self, *_):\n        pass\n",
}
ROW = {"prompt": "2,3,4>9?", "answer": "9"}
ROWS = {  # of JSON lines
    "good": [ROW] * 8,
    "short": [*[ROW] * 5, {"prompt": "1"}, *[ROW] * 4],
    "null": [*[ROW] * 5, {"prompt": "1", "answer": None}, *[ROW] * 4],
    "chat": [{"prompt": [{"role": "user", "content": "x"}], "answer": "1"}] * 8,
    "numbers": [{"prompt": 5, "answer": "1"}] * 8,
    "long": [{"prompt": "2,3,4>9?" * 40, "answer": "1"}] * 8,
}


def rows(name, **columns):
    """An overlay that trains on a file of rows."""
    train = {"class_path": "Files", "init_args": {"path": name, **columns}}
    return json.dumps({"data": {"reward": "prerl_lightning.rewards.boxed_reward", "train": train}})


def lives(*steps, successor=None, objective="GRPO", **options):
    """An overlay with a life from each of the steps on."""
    successor = {"class_path": objective, "init_args": successor or {}}
    arguments = [{"at_step": step, "successor": successor, **options} for step in steps]
    callbacks = [{"class_path": "PolicyReincarnation", "init_args": each} for each in arguments]
    return json.dumps({"trainer": {"callbacks": callbacks}})


def damaged(folder):
    """Copies of the embedded model, each with something wrong about it."""

    def copy(name):
        made = folder / name
        made.mkdir()
        for file in (ASSETS / "countdown").iterdir():
            (made / file.name).symlink_to(file)
        return made

    def put(name, file, content):
        path = copy(name) / file
        path.unlink()
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    def weights(name, **changed):
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        path = copy(name) / "model.safetensors"
        path.unlink()
        save_file(kept, path)

    source = ASSETS / "countdown" / "model.safetensors"
    tensors, config = load_file(source), json.loads((source.parent / "config.json").read_text())
    norm = tensors["model.norm.weight"]
    (copy("no_weights") / "model.safetensors").unlink()
    put("cut", "model.safetensors", source.read_bytes()[:100_000])
    put("no_bytes", "model.safetensors", b"")
    put("other_sizes", "config.json", config | {"intermediate_size": config["intermediate_size"] // 2})
    put("garbage", "config.json", b"{")
    put("other_type", "config.json", config | {"model_type": "lama"})
    put("no_lm", "config.json", config | {"model_type": "vit", "architectures": ["ViTModel"]})
    weights("one_missing", **{"model.norm.weight": None})
    weights("one_more", **{"model.layers.0.more.weight": norm.clone()})
    weights("not_finite", **{"model.norm.weight": norm * float("nan")})
    for file in copy("no_tokenizer").glob("*token*"):
        file.unlink()


EARLY = "lightning.pytorch.callbacks.EarlyStopping"
CASES = [
    # --- the command line
    ("dance", "dance: no such command"),
    ("fitt", r"fitt: no such command\. Did you mean fit\?"),
    ("fit", "data.train, model: missing"),
    ("fit --config nowhere.yaml", "--config: nowhere.yaml: no such file"),
    ("fit --config cut", "--config: cut: is a folder"),
    ("fit --confg base.yaml", r"confg: there is no such key\. Did you mean config\?"),
    ("--trainer.max_steps", "trainer.max_steps: expected one argument"),
    ("fit --config base.yaml extra", "extra: an argument without a key"),
    ("--trainr.max_steps=5", r"trainr\.max_steps: there is no such key\. Did you mean trainer\?"),
    ("--trainer.max_step=5", r"trainer\.max_step: there is no such key\. Did you mean trainer\.max_steps\?"),
    ("--data.sampling.groupsize=4", r"data\.sampling\.groupsize: .* Did you mean data\.sampling\.group_size\?"),
    ("--data.prompts_per_stp=4", r"data\.prompts_per_stp: .* Did you mean data\.prompts_per_step\?"),
    ("--model.init_args.beta=0.1", r".* has no such argument\. Here that is model\.init_args\.kl_coefficient\."),
    ("--actor_rollout_ref.actor.optim.lr=1", r".* no such key\. That is verl's: docs/coming-from/verl\.md has ours\."),
    ("--lr=1e-4", r"lr: there is no such key\. Did you mean model\.init_args\.lr\?"),
    ("--max_steps=5", r"max_steps: there is no such key\. Did you mean trainer\.max_steps\?"),
    (
        "{model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}}}}",
        r"GRPO\.optimizer: its lr, 0\.5, would not be used: the learning rate is model\.init_args\.lr, 0\.001\.",
    ),
    ("--model.init_args.learning_rate=1", r"model\.init_args\.learning_rate: GRPO has no such argument"),
    ("--model.init_args.lr_shedule=linear", r"model\.init_args\.lr_shedule: GRPO .* Did you mean lr_schedule\?"),
    (
        "--data.engine.init_args.max_model_length=64",
        r"data\.engine\.init_args\.max_model_length: VLLMEngine .* Did you",
    ),
    ("--model=GRPOO", r"model: GRPOO is not what can be imported here\. Did you mean GRPO\?"),
    ("--model=nowhere.Objective", "model: nowhere.Objective is not .*: No module named 'nowhere'"),
    ("--model=torch.nn.Linear", "model: torch.nn.Linear is not .* PolicyModule"),
    ("--data.engine=VLLM", r"data\.engine: VLLM .* Did you mean VLLMEngine\?"),
    ("--data.reward=math.nowhere", "data.reward: math.nowhere is not .* has no attribute 'nowhere'"),
    ("--data.reward=nowhere.reward", "data.reward: nowhere.reward is not .*: No module named 'nowhere'"),
    ("--data.reward=boxed_rewrd", r"data\.reward: boxed_rewrd .* Did you mean boxed_reward\?"),
    ("--data.reward=rewards_here.py", r"data\.reward: rewards_here\.py: .* Write rewards_here\.FUNCTION\."),
    (
        "--data.reward=./deep/mine.py:right",
        r"data\.reward: .*: a reward goes by its import path\. Write deep\.mine\.right",
    ),
    ("--data.reward=/else/mine.py", r"data\.reward: .* Write mine\.FUNCTION, and put /else into PYTHONPATH\."),
    (
        "{data: {reward: {class_path: 'data.rewards:right'}}}",
        r"data\.reward: data\.rewards:right: .* Write data\.rewards\.right\.",
    ),
    ("--model=DAPO", r"model: DAPO: .* Write --config objectives/dapo\.yaml\."),
    ("--model.class_path reinforce++", r"model: reinforce\+\+: .* Write --config objectives/reinforce_pp\.yaml\."),
    ("{model: {class_path: Dr. GRPO}}", r"model: Dr\. GRPO: .* Write --config objectives/dr_grpo\.yaml\."),
    (
        "--data.engine.init_args.tensor_parallel_size=2",
        r"data\.engine\.init_args\.tensor_parallel_size: VLLMEngine has no such argument\. An engine has one GPU here",
    ),
    (
        "{model: {init_args: {lora: {r: 8}}}}",
        r"model\.init_args\.lora\.r: Lora has no such argument\. Did you mean rank\?",
    ),
    (
        "--model.init_args.lora.lora_alpha=16",
        r"model\.init_args\.lora\.lora_alpha: .* Here that is model\.init_args\.lora\.al",
    ),
    ("--data.reward=rewards_here.number", "data.reward: rewards_here.number is not"),
    # --- types
    ("--model.init_args.lr=abc", "model.init_args.lr: abc must be a number"),
    ("--trainer.max_steps=many", "trainer.max_steps: many must be a whole number"),
    ("--data.sampling.group_size=2.5", "data.sampling.group_size: 2.5 must be a whole number"),
    ("--data.sampling.temperature=hot", "data.sampling.temperature: hot must be a number"),
    ("--data.sampling.stop_token_ids=[a]", "data.sampling.stop_token_ids: a must be a whole number"),
    ("--data.sampling.stop=x", "data.sampling.stop: x must be a list"),
    ("--data.on_bad_prompt=ignore", "data.on_bad_prompt: ignore must be one of drop, error"),
    ("--model.init_args.lr_schedule=exp", "model.init_args.lr_schedule: exp must be one of constant, linear, cosine"),
    ("--model.init_args.aggregation=mean", "model.init_args.aggregation: mean must be one of"),
    ("--data.engine.init_args.dtype=float64", r"data\.engine\.init_args\.dtype: float64 .* Did you mean float\d\d\?"),
    ("--checkpoint.mode=avg", "checkpoint.mode: avg must be one of min, max"),
    ("--export.dtype=float8", "export.dtype: float8 must be one of"),
    ("--thoughts.rule=x", "thoughts.rule: x must be one of phrases, seal"),
    ("--health.stop_on=[colour]", "health.stop_on: colour must be one of"),
    ("--seed_everything=abc", "seed_everything: abc must be true or false or a whole number"),
    ("--data.train=bad.jsonl", r"data\.train: bad\.jsonl: a set of problems is a class\. Write {class_path: Files, "),
    ("--data.val=gsm8k", r"data\.val: gsm8k: a set .* Write {class_path: NamedProblems, init_args: {name: gsm8k}}\."),
    ("{data: {train: openai/gsm8k}}", r"data\.train: openai/gsm8k: .* {class_path: HubDataset, init_args: {name: open"),
    (
        "--data.train=data/*.csv",
        r"data\.train: data/\*\.csv: .* {class_path: Files, init_args: {path: data/\*\.csv}}\.",
    ),
    (
        "--data.train=bad.parquet",
        r"data\.train: bad\.parquet: a set of problems is a class\. Write {class_path: Files, ",
    ),
    (
        "--data.train data/train.csv",
        r"data\.train: data/train\.csv: .* {class_path: Files, init_args: {path: data/train\.csv}}",
    ),
    (
        "--data.train data.json",
        r"data\.train: data\.json: .* Write {class_path: Files, init_args: {path: data\.json}}\.",
    ),
    (
        "{data: {train: [data/train.csv]}}",
        r"data\.train: data/train\.csv: .* {class_path: Files, init_args: {path: data/train\.csv}}",
    ),
    (
        "{data: {train: {class_path: Mixture, init_args: {sets: {a-b: gsm8k}}}}}",
        r"data\.train\.init_args\.sets\.a-b: gsm8k: .* {class_path: NamedProblems, init_args: {name: gsm8k}}\.",
    ),
    ("--data.train=binary.yaml", r"data\.train: it names a file that is no configuration, not even text\. Write"),
    ("--trainer.precision=fp16", r"trainer\.precision: fp16 must be one of 32-true, bf16-mixed\."),
    ("--trainer.deterministic=maybe", "trainer.deterministic: maybe must be true or false or warn"),
    *(
        (f"{{{key}: null}}", f"{key}: null: leave it out")
        for key in ("checkpoint", "health", "thoughts", "trainer", "data")
    ),
    *(
        (f"{{data: {{{key}: null}}}}", rf"data\.{key}: null: leave it out")
        for key in ("sampling", "verification", "format", "val_greedy", "prompts_per_step")
    ),
    ("{trainer: {max_steps: null}}", r"trainer\.max_steps: null: leave it out"),
    ("{trainer.accumulate_grad_batches: null}", r"trainer\.accumulate_grad_batches: null: leave it out"),
    ("--checkpoint.save_top_k=null", r"checkpoint\.save_top_k: null: leave it out"),
    ("{model: {init_args: null}}", r"model\.init_args: null: leave it out"),
    ("--data.train.init_args.split=dev", "data.train.init_args.split: dev must be one of"),
    # --- configuration files
    ("--config empty.yaml", "--config: empty.yaml: it is empty"),
    ("--config list.yaml", "--config: list.yaml: it holds no keys"),
    ("--config broken.yaml", "--config: broken.yaml, line 2, column 1: not YAML"),
    ("--config binary.yaml", "--config: binary.yaml: not text in UTF-8"),
    ("--config twice.yaml", "--config: twice.yaml, line 3: the key trainer is there twice, before in line 1"),
    ("--config twice_below.yaml", "--config: twice_below.yaml, line 3: the key max_steps is there twice"),
    ("{modle: {init_args: {lr: 1}}}", r"modle\.init_args\.lr: there is no such key\. Did you mean model\?"),
    ("{trainer: {max_step: 3}}", r"trainer\.max_step: .* Did you mean trainer\.max_steps\?"),
    ("{data: {sampling: {groupsize: 3}}}", r"data\.sampling\.groupsize: .* Did you mean data\.sampling\.group_size\?"),
    ("{model: {init_args: {lrr: 1}}}", r"model\.init_args\.lrr: GRPO has no such argument\. Did you mean lr\?"),
    ("{data: {train: {class_path: CountdownProblem}}}", r"data\.train: .* Did you mean CountdownProblems\?"),
    ("{model: {init_args: {optimizer: {class_path: torch.optim.Adm}}}}", "model.init_args.optimizer: torch.optim.Adm"),
    (
        "{model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {momentun: 1}}}}}",
        r"model\.init_args\.optimizer\.init_args\.momentun: SGD has no such argument\. Did you mean momentum\?",
    ),
    ("{trainer: {callbacks: [{class_path: PolicyReincarnaton}]}}", r"trainer\.callbacks: .* Did you mean PolicyReinc"),
    (
        "{trainer: {callbacks: [{class_path: PolicyReincarnation, init_args: {at_step: 2}}]}}",
        r"trainer\.callbacks\.init_args\.successor: missing",
    ),
    (
        lives(2, successor={"learning_rate": 1}),
        r"trainer\.callbacks\.init_args\.successor\.init_args\.learning_rate: GRPO",
    ),
    (lives(2, optimizer="keep"), r"trainer\.callbacks\.init_args\.optimizer: keep must be one of carry, reset"),
    # --- ranges
    ("--seed_everything=-3", "seed_everything: -3 must be a whole number from 0"),
    ("--seed_everything=99999999999", "seed_everything: 99999999999 must be"),
    ("--data.seed=-1", "data.seed: -1 must be a finite number of at least 0"),
    ("--model.init_args.lr=-1", r"GRPO\.lr: -1\.0 must be a finite number of at least 0"),
    ("--model.init_args.lr=.nan", r"GRPO\.lr: nan must be"),
    ("--model.init_args.minibatches=0", "GRPO.minibatches: 0 must be"),
    ("--model.init_args.minibatches=9", "GRPO.minibatches: 9 are more than data.prompts_per_step"),
    ("--model.init_args.minibatches=3", "trainer.max_steps: 4. GRPO takes 3 optimizer steps a rollout"),
    ("--model.init_args.epochs=0", "GRPO.epochs: 0 must be"),
    ("--model.init_args.clip_low=-1", "GRPO.clip_low: -1.0 must be"),
    ("--model.init_args.kl_coefficient=-1", "GRPO.kl_coefficient: -1.0 must be"),
    ("--model.init_args.warmup_steps=-1", "GRPO.warmup_steps: -1 must be"),
    ("--model.init_args.importance_cap=1", "GRPO.importance_cap: 1.0 must be a finite number above 1"),
    ("--model.init_args.gradient_clip=-1", "GRPO.gradient_clip: -1.0 must be"),
    (
        "{model: {class_path: MixedRL, init_args: {pretrain_coefficient: -1}}}",
        "MixedRL.pretrain_coefficient: -1.0 must be",
    ),
    (
        "{model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {weight_decay: -1}}}}}",
        "GRPO.optimizer: ValueError: Invalid weight_decay value: -1",
    ),
    ("--data.val_samples=0", "data.val_samples: 0 must be"),
    ("--data.refill=-1", "data.refill: -1 must be"),
    ("{checkpoint: {monitor: reward/right/mean}}", "checkpoint.monitor: this run has no metric reward/right/mean"),
    ("--data.val_batch=0", "data.val_batch: 0 must be"),
    ("--data.prompts_per_step=0", "data.prompts_per_step: 0 must be"),
    ("--data.prompts_per_step=-4", "data.prompts_per_step: -4 must be"),
    ("--data.max_prompt_tokens=0", "data.max_prompt_tokens: 0 must be"),
    ("--data.train.init_args.size=0", "CountdownProblems.size: 0 must be"),
    ("--data.sampling.group_size=0", "data.sampling.group_size: 0 must be"),
    ("--data.sampling.group_size=1", "data.sampling.group_size: 1. A response's advantage"),
    ("--data.sampling.temperature=0", "data.sampling.temperature: 0.0 must be a finite number above 0"),
    ("--data.sampling.temperature=.inf", "data.sampling.temperature: inf must be"),
    ("--data.sampling.temperature=.nan", "data.sampling.temperature: nan must be"),
    ("--data.sampling.top_p=2", "data.sampling.top_p: 2.0 must be a finite number of at most 1"),
    ("--data.sampling.top_k=-1", r"data\.sampling\.top_k: -1: that is off in vLLM and verl; here 0 is\. Write 0"),
    ("--data.val_sampling.top_k -1", r"data\.val_sampling\.top_k: -1: that is off .* Write 0"),
    ("--data.sampling.top_k=-2", "data.sampling.top_k: -2 must be"),
    ("--data.sampling.max_new_tokens=0", "data.sampling.max_new_tokens: 0 must be"),
    ("--data.sampling.max_new_tokens=64", "data.sampling.max_new_tokens: 64 leaves no room for a prompt"),
    ("--data.sampling.stop_token_ids=[100000]", r"data\.sampling\.stop_token_ids: 100000 is no token of this model"),
    ("--data.sampling.stop_token_ids=[-1]", "data.sampling.stop_token_ids: -1 is no token"),
    ("--data.verification.workers=-1", "data.verification.workers: -1"),
    ("--data.verification.timeout=0", "data.verification.timeout: 0"),
    (
        "--data.reward=textwrap.dedent",
        r"data\.reward: .* A reward is called with the prompt, the response, the ground truth",
    ),
    ("--data.num_generations=4", "data.num_generations: there is no such key. Here that is data.sampling.group_size."),
    ("--model.init_args.learning_rate=1", ".* has no such argument. Here that is model.init_args.lr."),
    ("--model=GPRO", r"model: GPRO is not what can be imported here.* Did you mean GRPO\?"),
    ("--checkpoint.every_n_train_steps=-1", "checkpoint.every_n_train_steps: -1 must be"),
    ("--checkpoint.save_top_k=-2", "checkpoint.save_top_k: -2 must be"),
    ("--checkpoint.save_top_k=2", r"checkpoint\.save_top_k: 2: .* Give checkpoint\.monitor"),
    ("--checkpoint.monitor=val/agv@8", r"checkpoint\.monitor: .* Did you mean val/avg@8\?"),
    ("--samples.every_n_steps=-1", "samples.every_n_steps: -1 must be"),
    ("--samples.number=-1", "samples.number: -1 must be"),
    ("--weights.every_n_steps=-1", "weights.every_n_steps: -1 must be"),
    ("--alignment.every_n_steps=-1", "alignment.every_n_steps: -1 must be"),
    ("--alignment.bins=1", "alignment.bins: 1 would be the whole response"),
    ("--health.no_signal=-1", "health.no_signal: -1 must be"),
    ("--health.accuracy=2", "health.accuracy: 2.0 must be a finite number of at most 1"),
    ("--thoughts.families=none.yaml", "thoughts.families: none.yaml cannot be read"),
    ("{thoughts: {families: {a: []}}}", "thoughts.families: 'a': a family is one word and a list of phrases"),
    # --- the engine
    ("--data.engine.init_args.max_model_len=0", "data.engine.init_args.max_model_len: 0 must be"),
    (
        "--data.engine.init_args.max_model_len=100000",
        r"data\.engine\.init_args\.max_model_len: 100000 is more than the",
    ),
    ("--data.engine.init_args.kv_cache_mib=0", "data.engine.init_args.kv_cache_mib: 0 must be"),
    ("--data.engine.init_args.max_num_seqs=0", "data.engine.init_args.max_num_seqs: 0 must be"),
    ("--data.engine.init_args.gpu_memory_utilization=0", "data.engine.init_args.gpu_memory_utilization: 0.0 must be"),
    ("--data.engine.init_args.gpu_memory_utilization=2", "data.engine.init_args.gpu_memory_utilization: 2.0 must be"),
    (
        "{data: {engine: {init_args: {extra: {max_num_batched_token: 64}}}}}",
        r"data\.engine\.init_args\.extra\.max_num_batched_token: vllm\.LLM .* Did you mean max_num_batched_tokens\?",
    ),
    ("{data: {engine: {init_args: {extra: {tensor_parallel_size: 2}}}}}", r"data\.engine: extra\.tensor_parallel_size"),
    # --- the model
    ("--model.init_args.model=./nowhere", r"model: './nowhere' is no folder with a config\.json"),
    ("--model.init_args.model=./file", r"model: './file' is no folder with a config\.json"),
    ("--model.init_args.model=null", r"model\.init_args\.model: missing"),
    ("--model.init_args.model=embeded", r"model: there is no 'embeded'\. Did you mean embedded\?"),
    ("--model.init_args.model=nobody/nothing", "model: 'nobody/nothing' is no folder here, and the hub, .* cannot"),
    *(
        (f"--model.init_args.model=./{name}", rf"model: './{name}'{words}")
        for name, words in {
            "no_weights": " cannot be loaded: .*safetensors.* The folder is damaged",
            "cut": " cannot be loaded: SafetensorError: .* The folder is damaged",
            "no_bytes": " cannot be loaded: SafetensorError: .* The folder is damaged",
            "garbage": " cannot be loaded: .* The folder is damaged",
            "other_type": " cannot be loaded: .*lama.* The folder is damaged",
            "no_lm": " cannot be loaded: .* The folder is damaged",
            "no_tokenizer": " cannot be loaded: .* The folder is damaged",
            "other_sizes": ": weights of .* have another shape than its config.json says",
            "one_missing": r": weights of .* are missing: model\.norm\.weight",
            "one_more": r": weights of .* are none of this model's: model\.layers\.0\.more\.weight",
            "not_finite": r": weights of .* are not finite: model\.norm\.weight",
        }.items()
    ),
    ("--model.init_args.prefix=3*7", r"prefix: '3\*7' is 3 tokens for this tokenizer; it must be one"),
    ("--model.init_args.prefix=99999", "prefix: id 99999 is outside the tokenizer's"),
    ("--model.init_args.attn_implementation=flash_attention_2", r"model\.init_args\.attn_implementation: 'flash"),
    ("--model.init_args.attn_implementation=foo", r"model\.init_args\.attn_implementation: 'foo' does not work here"),
    # --- data
    (rows("none.jsonl"), r"none\.jsonl: no such file"),
    (rows("empty.jsonl"), r"empty\.jsonl: the file is empty"),
    (rows("bad.jsonl"), r"bad\.jsonl, line 2: not JSON"),
    (rows("array.jsonl"), r"array\.jsonl: 2 of 2 rows make no problem, .* row 0: .* not a JSON object"),
    (rows("bad.parquet"), r"bad\.parquet: it cannot be read"),
    (
        rows("good.jsonl", prompt="question"),
        r"good\.jsonl: 8 of 8 rows make no problem, .* row 0: no column 'question'; its columns are answer, prompt",
    ),
    (
        rows("short.jsonl", max_unusable=0),
        r"short\.jsonl: 1 of .* The first: row 5: no column 'answer'; its columns are prompt",
    ),
    (rows("null.jsonl", max_unusable=0), r"null\.jsonl: 1 of .* The first: row 5: 'answer' is missing"),
    (rows("numbers.jsonl"), r"numbers\.jsonl: 8 of 8 .* row 0: 'prompt' is neither text nor"),
    (rows("chat.jsonl"), "Row 0 is chat messages, and the model's tokenizer has no chat template"),
    (rows("long.jsonl"), r"data\.train: no usable prompt among 1; row 0: the prompt has"),
    (rows("good.jsonl", limit=0), r"Files\.limit: 0 must be"),
    ("{data: {train: {class_path: Files, init_args: {path: good.jsonl}}}}", "data.reward: missing"),
    ("--data.prompts_per_step=99", "data.train: 16 usable prompts are fewer than data.prompts_per_step"),
    ("--data.format.system=hi", "data.format.system: needs chat"),
    ("--data.format.template=hi", "data.format.template: has no {prompt} in it"),
    ("validate --config base.yaml --data.val=null", "data.val: missing"),
    ("test --config base.yaml --data.val=null", "data.val: missing"),
    # --- the Trainer
    ("--trainer.max_steps=-5", "trainer.max_steps: -5 must be a finite number of at least -1"),
    ("--trainer.max_steps=0", "trainer.max_steps: 0 trains nothing"),
    ("--trainer.max_epochs=-5", "trainer.max_epochs: -5 must be"),
    ("--trainer.limit_train_batches=0", "trainer.limit_train_batches: 0 trains nothing"),
    ("--trainer.limit_train_batches=0.01", "trainer.limit_train_batches: 0.01 of 4 batches is none"),
    ("--trainer.limit_val_batches=0.25", "trainer.limit_val_batches: 0.25 of 1 batches is none"),
    ("--trainer.limit_val_batches=-1", "trainer.limit_val_batches: -1 must be"),
    ("--trainer.val_check_interval=0.5", "trainer.val_check_interval: 0.5 must be a whole number of rollouts"),
    ("--trainer.val_check_interval=0", "trainer.val_check_interval: 0 must be"),
    ("--trainer.gradient_clip_val=1", r"trainer\.gradient_clip_val: 1.* model\.init_args\.gradient_clip"),
    ("--trainer.accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches: 2: .* data\.prompts_per_step"),
    ("--trainer.overfit_batches=1", "trainer.overfit_batches: 1: prompts are drawn anew"),
    ("--trainer.reload_dataloaders_every_n_epochs=1", "trainer.reload_dataloaders_every_n_epochs: 1: it would begin"),
    ("--trainer.strategy=ddpp", r"trainer\.strategy: there is no ddpp\. Did you mean ddp\?"),
    ("--trainer.strategy=fsdp", r"trainer\.strategy: .* Write fsdp2"),
    ("--trainer.precision=64-true", "trainer.precision: 64-true is not for training here"),
    ("--trainer.precision=16-mixed", "trainer.precision: 16-mixed scales the loss"),
    ("--trainer.precision=foo", "trainer.precision: foo must be"),
    ("--trainer.strategy=ddp --trainer.devices=3", "data.prompts_per_step: 4 prompts do not divide over 3 ranks"),
    ("--trainer.devices=0", "trainer.devices: 0"),
    ("--trainer.accelerator=tpu", "trainer.accelerator: tpu has no engine here. Write auto, cpu or gpu"),
    ("--trainer.accelerator=foo", "trainer.accelerator: foo"),
    ("--trainer.strategy=ddp_spawn", "trainer.strategy: ddp_spawn: ranks are processes of their own here"),
    (
        "--trainer.strategy=lightning.pytorch.strategies.DeepSpeedStrategy",
        "trainer.strategy: .*Write auto, ddp or fsdp2",
    ),
    ("--trainer.val_check_interval=00:00:10:00", "trainer.val_check_interval: 00:00:10:00 must be a whole number"),
    (
        "--trainer.max_time=10:00:00:00 --trainer.limit_predict_batches=2",
        "trainer.limit_predict_batches: 2: there is no",
    ),
    ("--trainer.max_time=00:00:30", "trainer.max_time: 00:00:30 is no time. Write DD:HH:MM:SS in quotes"),
    ("{trainer: {max_time: {minutes: 0}}}", "trainer.max_time: .* trains nothing"),
    (
        "{trainer: {max_time: {hours: 1}, callbacks: [{class_path: Timer, init_args: {duration: '00:01:00:00'}}]}}",
        "trainer.max_time: it would not count beside the Timer of trainer.callbacks",
    ),
    (
        "{trainer: {plugins: {class_path: lightning.pytorch.plugins.MixedPrecision, "
        "init_args: {precision: bf16-mixed, device: cpu}}}}",
        "trainer.precision: 32-true: ValueError: Received both",
    ),
    ("--trainer.callbacks=LearningRateMonitor", "trainer.callbacks: LearningRateMonitor: optim/lr is in each row"),
    (
        "{trainer: {logger: [{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dirr: x}}]}}",
        r"trainer\.logger\.init_args\.save_dirr: CSVLogger has no such argument\. Did you mean save_dir\?",
    ),
    ("--trainer.logger=CometLogger", "trainer.logger: CometLogger needs the package comet_ml: pip install comet-ml"),
    ("--trainer.logger=MLFlowLogger", "trainer.logger: MLFlowLogger needs the package mlflow: pip install mlflow"),
    *(
        (f"--trainer.logger={name}", rf"trainer\.logger: {name}: .* Write --config logger/{name.lower()}\.yaml\.")
        for name in ("wandb", "TensorBoard", "mlflow", "comet", "swanlab", "LitLogger")
    ),
    ("""--trainer.logger '["console","wandb"]'""", r"trainer\.logger: wandb: .* Write --config logger/wandb\.yaml\."),
    ("{trainer: {logger: {class_path: LitLoger}}}", "trainer.logger: LitLoger .* lightning.pytorch.loggers.LitLogger"),
    ("--trainer.logger=NeptuneLogger", "trainer.logger: NeptuneLogger is not what can be imported here"),
    ("--trainer.num_nodes=0", "trainer.num_nodes: 0 must be"),
    ("--trainer.log_every_n_steps=-1", "trainer.log_every_n_steps: -1 must be"),
    ("--trainer.fast_dev_run=-1", "trainer.fast_dev_run: -1 must be"),
    ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch: 0 must be"),
    ("--trainer.profiler=foo", "trainer.profiler: foo: "),
    ("--trainer.barebones=true", "trainer"),
    ("--trainer.logger=FooLogger", "trainer.logger: FooLogger"),
    ("{trainer: {plugins: [foo]}}", r"trainer\.plugins: .* is no Precision\. Give one by its class_path"),
    (
        json.dumps({"trainer": {"callbacks": [{"class_path": EARLY, "init_args": {"monitor": "val/foo"}}]}}),
        "EarlyStopping.monitor: this run has no metric val/foo",
    ),
    (
        json.dumps(
            {"trainer": {"callbacks": [{"class_path": EARLY, "init_args": {"monitor": "val/avg@8", "mode": "up"}}]}}
        ),
        "trainer",
    ),
    # --- lives
    (lives(0), "PolicyReincarnation.at_step: 0 must be at least 1"),
    (lives(2, 2), r"PolicyReincarnation\.at_step: two lives begin at the same step \(2, 2\)"),
    (lives(9, until={"metric": "reward/mean", "patience": 0}), r"PolicyReincarnation\.until\.patience: 0 must be"),
    (lives(9, until={"metric": "reward/maen"}), r"PolicyReincarnation\.until\.metric: .* mean reward/mean\?"),
    (lives(2, successor={"lr": -1}), r"GRPO\.lr: -1\.0 must be"),
    (
        lives(2, successor={"model": "embedded-sums"}),
        r"PolicyReincarnation\.successor: GRPO\.model: 'embedded-sums', while",
    ),
    (
        lives(2, successor={"optimizer": {"class_path": "torch.optim.SGD"}}),
        r"PolicyReincarnation\.optimizer: at step 2 the state of AdamW cannot be carried into SGD",
    ),
    (
        lives(2, objective="objectives_here.Hooked"),
        r"PolicyReincarnation\.successor: Hooked\.on_train_batch_start would never be called: .* into a callback",
    ),
    ("{model: {class_path: objectives_here.Stepping}}", r"model: Stepping\.optimizer_step: optimisation is manual"),
    (lives(2, successor={"prefix": "3*7"}), r"prefix: '3\*7' is 3 tokens"),
    ([lives(3), "--model.init_args.minibatches=2"], r"PolicyReincarnation\.at_step: 3\. GRPO takes 2"),
    ("--trainer.max_steps=-1 --model.init_args.lr_schedule=cosine", r"GRPO\.lr_schedule: cosine needs an end"),
    (
        [lives(2, successor={"lr_schedule": "linear"}), "--trainer.max_steps=-1"],
        r"GRPO\.lr_schedule: linear needs an end",
    ),
    # --- checkpoints
    ("--ckpt_path=nope.ckpt", "--ckpt_path: there is no nope.ckpt"),
    ("--ckpt_path=last", r"--ckpt_path: there is no folder runs/base.* or leave --ckpt_path out to start anew\."),
    ("--ckpt_path=best", "--ckpt_path: there is no folder runs/base"),
    ("--ckpt_path=file", "--ckpt_path: file is cut off, or no checkpoint"),
    # --- the other commands
    ("evaluate", "prerl evaluate: give --model and --data"),
    ("evaluate --model embedded --data math500 --k 0", "--k: 0 is below 1"),
    ("evaluate --model embedded --data nope", ".*nope"),
    ("evaluate --k x", "prerl evaluate: argument --k: invalid int value: 'x'"),
    ("compare one", "prerl compare: the following arguments are required: b"),
    ("compare one two", "prerl compare: one: no such folder"),
    ("report", "prerl report: the following arguments are required: RUN"),
    ("report nowhere", ".*nowhere"),
    ("watch nowhere", ".*nowhere"),
    ("study nowhere.yaml", ".*nowhere.yaml"),
    ("doctor --confg x", "prerl doctor: unrecognized arguments: --confg x"),
    ("pretrain", ".*--?(out|config|stages)|.*missing"),
]


class Reached(Exception):
    """The engine would have started."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, lines in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "bad.jsonl").write_text(json.dumps(ROW) + "\n{nope\n")
    (folder / "bad.parquet").write_bytes(b"PAR1" + b"x" * 100)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    damaged(folder)
    return folder


@pytest.fixture(scope="module")
def prerl(folder):
    """`prerl` called in ``folder`` in this process: no engine starts, no hub is asked, and the parser is made once,
    which takes longer than all else."""
    from prerl_lightning.run import PrerlCLI

    made = {}
    plain = PrerlCLI.setup_parser

    def setup_parser(self, *args):
        if not made:
            plain(self, *args)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            made.update({name: getattr(self, name) for name in names})
        self.__dict__.update(made)

    def start(self, *args):
        raise Reached

    with environment_kept(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrerlCLI, "setup_parser", setup_parser)
        patch.setattr("prerl_lightning.rollout.vllm_engine.VLLMEngine.start", start)
        patch.setattr("sys.argv", ["prerl"])
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def arguments(given, folder):
    """Of a case: a command line, which stands behind `fit --config base.yaml` unless it begins with a command; what
    begins with a brace is a configuration file's text."""
    args = []
    for i, part in enumerate([given] if isinstance(given, str) else given):
        if part.startswith("{"):
            (folder / f"overlay_{i}.yaml").write_text(part)
            args += ["--config", f"overlay_{i}.yaml"]
        else:
            args += shlex.split(part)
    return args if args[:1] and not args[0].startswith("-") else ["fit", "--config", "base.yaml", *args]


def test_the_base_of_the_table_is_right(prerl, folder, capsys):
    from prerl_lightning.cli import main

    with pytest.raises(Reached):
        main(["fit", "--config", "base.yaml"])
    assert not list(folder.rglob("version_*"))  # a start that failed leaves none


@pytest.mark.parametrize(("given", "pattern"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused(prerl, folder, capsys, given, pattern):
    from prerl_lightning.cli import main

    with pytest.raises(SystemExit) as ending:
        main(arguments(given, folder))
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert ending.value.code == 2, said
    assert re.match(rf"prerl: error: {pattern}", last), last
    assert len(last) < 1000, last
    assert "usage:" not in said
    assert "Traceback" not in said
    assert not list(folder.rglob("version_*"))


MIXED = """
model: {class_path: GRPO, init_args: {model: embedded}}
data:
  train:
    class_path: Mixture
    init_args:
      sets:
        plain: {class_path: CountdownProblems, init_args: {split: train, size: 16}}
        shown:
          class_path: Source
          init_args:
            problems: {class_path: CountdownProblems, init_args: {split: train, size: 8}}
            format: {template: "1+1=2 {prompt}"}
            max_new_tokens: 16
            reward:
              class_path: prerl_lightning.rewards.WeightedSum
              init_args:
                rewards: {right: prerl_lightning.rewards.countdown_reward, short: {class_path: prerl_lightning.rewards.LengthPenalty, init_args: {full: 64}}}
                weights: {right: 1, short: 0.1}
                normalise: true
      weights: {plain: 1, shown: 3}
  val: {class_path: CountdownProblems, init_args: {split: held_out, size: 8}}
  val_more: {cool: {class_path: Source, init_args: {problems: {class_path: CountdownProblems, init_args: {split: held_out, size: 8}}, temperature: 0.2, samples: 2}}}
  prompts_per_step: 4
  refill: 3
  sampling: {group_size: 4, max_new_tokens: 32}
  verification: {workers: 0, batch: 8}
  engine: {class_path: VLLMEngine, init_args: {max_model_len: 64}}
trainer: {max_steps: 4, accelerator: cpu}
checkpoint: {monitor: source/shown/reward}
"""  # noqa: E501


def test_a_mixture_and_a_sum_of_rewards_get_as_far_as_the_engine(prerl, folder, caplog):
    """And a sum as it was written before sums had names, and rewards by their names alone; the columns they bring may
    be monitored. A file may hold a class."""
    from prerl_lightning.cli import main

    (folder / "mixed.yaml").write_text(MIXED)
    (folder / "short.yaml").write_text(MIXED.replace("prerl_lightning.rewards.", ""))
    listed = {"rewards": ["prerl_lightning.rewards.boxed_reward", "prerl_lightning.rewards.boxed_format"]}
    listed |= {"weights": [1.0, 0.5]}
    older = {"class_path": "prerl_lightning.rewards.WeightedSum", "init_args": listed}
    (folder / "older.yaml").write_text(json.dumps({"data": {"reward": older}}))
    for args in (
        ["--config", "mixed.yaml"],
        ["--config", "mixed.yaml", "--checkpoint.monitor", "reward/right/mean"],
        ["--config", "mixed.yaml", "--checkpoint.monitor", "val/cool/avg@2"],
        ["--config", "mixed.yaml", "--checkpoint.monitor", "refill/groups"],
        ["--config", "base.yaml", "--config", "older.yaml", "--checkpoint.monitor", "reward/boxed_format/mean"],
        ["--config", "short.yaml", "--data.val_reward", "math_verify_reward"],
        ["--config", "base.yaml", "--data.train", "problems.json", "--data.reward", "NumericReward"],
    ):
        with pytest.raises(Reached):
            main(["fit", *args])


def test_callbacks_of_lightning_and_its_own_logger_get_as_far_as_the_engine(prerl, folder, capsys):
    """tests/test_trainer_arguments.py has a whole run with some of them."""
    from prerl_lightning.cli import main

    names = "TQDMProgressBar RichModelSummary DeviceStatsMonitor LambdaCallback ThroughputMonitor Timer ModelCheckpoint"
    callbacks = [{"class_path": f"lightning.pytorch.callbacks.{name}"} for name in names.split()]
    callbacks[4]["init_args"] = {"batch_size_fn": "builtins.len"}
    callbacks[5]["init_args"] = {"duration": "00:01:00:00"}
    io = {"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}
    trainer = {"callbacks": callbacks, "logger": True, "plugins": [io], "profiler": "advanced"}
    with pytest.raises(Reached):
        main(arguments(json.dumps({"trainer": trainer}), folder))
    assert not list(folder.rglob("version_*"))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Its own library would ask six times for each file, with pauses: 25 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked, session = [], hub.get_session
    monkeypatch.setattr(hub, "get_session", lambda: asked.append(1) or session())
    hub.look.cache_clear()
    for _ in range(2):
        with pytest.raises(InputError, match=r"'nobody/nothing' is no folder here, .* cannot be reached"):
            load_config("nobody/nothing")
    hub.look.cache_clear()
    assert len(asked) == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"
