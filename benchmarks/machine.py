"""What a result was measured on."""

from prerl_lightning.callbacks.record import machine, versions


def describe() -> dict:
    return machine() | {"packages": versions()}
