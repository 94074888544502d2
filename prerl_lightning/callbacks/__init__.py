"""Lightning callbacks: lives, and what watches and keeps a run."""

from prerl_lightning.callbacks.reincarnation import PolicyReincarnation

__all__ = ["PolicyReincarnation"]
