"""Logs the CPU seconds of each step as time/cpu; for trl_step.py, whose configuration names it."""

import time

import lightning as L


class CPUClock(L.Callback):
    def on_train_batch_start(self, trainer, *args):
        self.started = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.log("time/cpu", time.process_time() - self.started, batch_size=1)
