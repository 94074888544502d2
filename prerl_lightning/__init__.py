"""prerl-lightning: RL with verifiable rewards in pre-train and post-train space, on Lightning and vLLM."""

__version__ = "0.1.0"
