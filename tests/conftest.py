"""Random-weight models of real architectures, and rollouts over them."""

import logging
import os
import socket

if "PYTEST_XDIST_WORKER" in os.environ:  # OpenMP threads that wait spin: two processes would take turns at spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from commands import environment_kept

from prerl_lightning.rollout.vllm_engine import ENVIRONMENT
from prerl_lightning.types import Prompt, Response, Rollout

for _key, _value in ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

SHAPES = {
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", True),
    "llama-untied": ("LlamaConfig", "LlamaForCausalLM", False),
    "qwen2-tied": ("Qwen2Config", "Qwen2ForCausalLM", True),
    "qwen3-untied": ("Qwen3Config", "Qwen3ForCausalLM", False),
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function from a name in SHAPES to a folder with such a model and the embedded tokenizer."""
    import transformers

    from prerl_lightning.policy.model import load_tokenizer

    made = {}

    def make(name: str) -> str:
        if name not in made:
            config_name, class_name, tied = SHAPES[name]
            torch.manual_seed(len(name))
            tokenizer = load_tokenizer("embedded-sums")
            options = {} if "qwen3" not in name else {"head_dim": 32}
            config = getattr(transformers, config_name)(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                initializer_range=0.2,  # sharp distributions: a stale weight shows
                tie_word_embeddings=tied,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **options,
            )
            folder = tmp_path_factory.mktemp(name)
            getattr(transformers, class_name)(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_rollout():
    """A function that draws a rollout of P prompts with G responses each, of ragged lengths."""

    def make(n_prompts: int = 5, group_size: int = 4, seed: int = 0, vocab: int = 30, rewards=None) -> Rollout:
        generator = torch.Generator().manual_seed(seed)

        def ids(low: int, high: int) -> tuple[int, ...]:
            length = int(torch.randint(low, high, (1,), generator=generator))
            return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

        n = n_prompts * group_size
        responses = [ids(1, 20) for _ in range(n)]
        drawn = torch.randint(0, 2, (n,), generator=generator).double()
        return Rollout.of(
            [Prompt(i, (1, *ids(2, 12)), "", "") for i in range(n_prompts)],
            [Response(r, [-2.0] * len(r), "", False) for r in responses],
            group_ids=torch.arange(n_prompts).repeat_interleave(group_size),
            rewards=drawn if rewards is None else torch.tensor(rewards, dtype=torch.float64),
            policy_version=0,
            temperature=0.7,
        )

    return make


@pytest.fixture(autouse=True)
def log_as_imported():
    """Whatever ran before in this process: `main` has our lines go to stdout, past caplog."""
    log = logging.getLogger("prerl_lightning")
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """A function that calls `prerl` with wrong input, in an empty folder, and gives what it wrote to stderr; its exit
    status must be ``code``."""
    from prerl_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["prerl"])

    def call(*args, code=2) -> str:
        with pytest.raises(SystemExit) as ending:
            main(list(map(str, args)))
        assert ending.value.code == code
        return capsys.readouterr().err

    with environment_kept():
        yield call


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
