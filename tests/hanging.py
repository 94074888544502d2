"""A reward that hangs for good in a worker process, the way that $HANGS says: at its import, or at an answer."""

import os
import re
import subprocess
import sys
import time


def hang(how):
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()} {subprocess.Popen(['sleep', '300']).pid} ")
    if "C" in how:  # Python does not come to its turn
        re.match(r"(a+)+$", "a" * 64 + "b")
    while True:
        try:
            while "Python" in how:
                pass
            time.sleep(60)
        except BaseException:
            pass


def reward(prompt, response, ground_truth, extra):
    hang(os.environ["HANGS"])


if sys.argv[0].endswith("worker.py") and "import" in os.environ["HANGS"]:
    hang(os.environ["HANGS"])
