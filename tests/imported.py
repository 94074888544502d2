"""What the processes of forked.py have imported: all that `prerl fit` and `evaluate` do before the engine starts."""

import os

from prerl_lightning.terminal import quiet

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `prerl` does
quiet()

import prerl_lightning.run  # noqa: E402, F401

# as the engine does
from prerl_lightning.rollout.vllm_engine import ENVIRONMENT  # noqa: E402

os.environ |= ENVIRONMENT

import vllm.entrypoints.llm  # noqa: E402, F401
