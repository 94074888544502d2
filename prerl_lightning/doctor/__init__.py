"""``prerl doctor``: does this machine run what the library needs? A self-test in under two minutes.

    prerl doctor
    prerl doctor --config my.yaml --config configs/strategy/fsdp2.yaml
    prerl doctor --model Qwen/Qwen3-4B --json > report.json

A line a check: PASS, FAIL or SKIP, what was seen, and where it failed what mends it. Everything is tried out with a
tiny random model, from the first import to a run that is resumed; ``--config`` asks besides whether that run fits into
memory, and with ``--model`` the policy's passes are those of that model. One process, one GPU; all of them for what
ranks do together.

What the libraries print meanwhile is kept off the terminal, from C++ and other threads too: our lines go to a copy of
stdout. With PRERL_DEBUG=1 it goes to stderr, and a check that raised shows its traceback.
"""

import argparse
import atexit
import faulthandler
import json
import logging
import math
import os
import platform
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from prerl_lightning import __version__, shipped
from prerl_lightning.doctor.subject import Result, Subject, first_line, skipped
from prerl_lightning.errors import ArgumentParser, InputError


@dataclass(frozen=True)
class Check:
    """The function ``name`` in doctor/``module``.py; without those it ``needs`` it is not tried."""

    name: str
    module: str
    needs: tuple[str, ...] = ("accelerator",)


CHECKS = (
    Check("versions", "versions", ()),
    Check("accelerator", "machine", ()),
    Check("compiler", "machine", ()),
    Check("memory", "machine"),
    Check("budget", "runs"),
    Check("ranks", "runs"),
    Check("attention", "passes"),
    Check("policy", "passes"),
    Check("engine", "rollouts"),
    Check("step", "rollouts", ("engine",)),
)


# of the internet's two kinds; clock times, and a compiler's file:line:column, are none
HEX = "[0-9a-fA-F]{1,4}"
ADDRESS = re.compile(
    rf"\b\d{{1,3}}(?:\.\d{{1,3}}){{3}}\b|(?<![\w:])(?:{HEX}(?::{HEX}){{7}}|(?:(?:{HEX}:)+|:):{HEX}(?::{HEX})*)(?![\w:])"
)


def _arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "prerl doctor",
        description="A self-test of this machine in under two minutes: PASS, FAIL or SKIP, and what mends it.",
        epilog="Exit status: 0: nothing failed; 1: something did; 2: wrong arguments. PRERL_DEBUG=1 shows tracebacks "
        "and what the libraries print, on stderr.",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="as for prerl fit: does that run fit into memory?"
    )
    parser.add_argument(
        "--model", help="Hugging Face folder or hub id: its sizes, and its passes instead of a tiny one"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for a bug report, and nothing else")
    return parser


def doctor(args: Sequence[str]) -> None:
    """Run the command; exits with 1 where a check failed.

    Raises:
        InputError: the configuration or the model is none.
    """
    own = _arguments().parse_args(args)
    if own.json:
        logging.getLogger("prerl_lightning").setLevel(logging.WARNING)  # its log goes to stdout
    own.config = [shipped.path(file) for file in own.config]
    for file in own.config:
        if not Path(file).is_file():
            raise InputError(f"prerl doctor: --config {file}: no such file.{shipped.hint(file)}")
    debug = bool(os.environ.get("PRERL_DEBUG"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="prerl_doctor_", ignore_cleanup_errors=True) as folder:
        subject = Subject(own.model, own.config, Path(folder))
        with _terminal(debug) as out:
            _look_at_arguments(subject)
            rows = examine(subject, CHECKS, _Lines(out, bool(own.json)), debug)
            seconds = time.perf_counter() - start
            if own.json:
                print(json.dumps(_finite(_report(own, rows, seconds)), indent=1), file=out)
            else:
                print(_summary(rows, seconds, debug), file=out)
    if not debug:  # vLLM and NCCL have something to say at exit
        atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    if any(row["status"] == "FAIL" for row in rows):
        sys.exit(1)


def _look_at_arguments(subject: Subject) -> None:
    """Wrong ones are said before the first check; what does not import is left to the checks."""
    try:
        if subject.configs or subject.model:
            _ = subject.shape
    except InputError:
        raise
    except Exception:
        logging.getLogger(__name__).debug("left to the checks", exc_info=True)


def examine(
    subject: Subject, checks: Sequence[Check], say: Callable[[str, Result | None, float], None], debug: bool = False
) -> list[dict[str, Any]]:
    """Run the checks one after the other; one that raises has failed.

    Args:
        say: called before a check with its name, and after it with its result and seconds.

    Returns:
        a row a check, for JSON.
    """
    rows: list[dict[str, Any]] = []
    passed: dict[str, bool] = {}
    for check in checks:
        say(check.name, None, 0.0)
        start = time.perf_counter()
        missing = [name for name in check.needs if not passed.get(name)]
        if missing:
            found = skipped(f"needs {' and '.join(missing)}, which did not pass")
        else:
            with _warnings_of_ours() as warnings:
                found = _tried(check, subject, debug)
            found = replace(found, details=(*found.details, *warnings))
        found = replace(
            found,
            seen=discreet(found.seen),
            mend=discreet(found.mend),
            details=tuple(map(discreet, found.details)),
        )
        passed[check.name] = found.status == "PASS"
        seconds = time.perf_counter() - start
        rows.append({"name": check.name, **vars(found), "seconds": round(seconds, 2)})
        say(check.name, found, seconds)
    return rows


def _tried(check: Check, subject: Subject, debug: bool) -> Result:
    try:
        function: Callable[[Subject], Result] = getattr(import_module(f"{__name__}.{check.module}"), check.name)
        return function(subject)
    except (Exception, SystemExit) as error:
        details = tuple(traceback.format_exc().splitlines()) if debug else ()
        return Result("FAIL", first_line(error), details=details)


@contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """What the library itself warns of meanwhile, each once."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage().splitlines()[0]
            if line not in said:
                said.append(line)

    log, handler = logging.getLogger("prerl_lightning"), Keep(logging.WARNING)
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def discreet(text: str) -> str:
    """Without the values of variables that look secret, addresses, this host's name and the home folder's."""
    for key, value in os.environ.items():
        if len(value) >= 8 and re.search("TOKEN|KEY|SECRET|PASSWORD|PROXY", key.upper()):
            text = text.replace(value, f"${key}")
    text = ADDRESS.sub("ADDRESS", text)
    host = socket.gethostname().partition(".")[0]
    if host not in ("", "localhost"):
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?:\.[\w-]+)*(?![\w-])", "HOST", text)
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if home != os.sep else text


# ---------------------------------------------------------------------- what is printed


@contextmanager
def _terminal(debug: bool) -> Iterator[TextIO]:
    """Our own stdout. All else that is written to stdout and stderr goes into a file, which is shown on stderr where
    the command is left by `sys.exit`, as jsonargparse does; with ``debug`` it goes to stderr at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    encoding = sys.stdout.encoding or "utf-8"
    with tempfile.TemporaryFile() as noise, os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace") as out:
        os.dup2(2 if debug else noise.fileno(), 1)
        if not debug:
            os.dup2(noise.fileno(), 2)
        faulthandler.enable(kept[1])  # a library that crashes takes this process with it
        try:
            yield out
        except SystemExit:
            noise.seek(0)
            os.write(kept[1], noise.read())
            raise
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


class _Lines:
    """Prints each result as soon as it is there; in a terminal, what is being tried before."""

    def __init__(self, out: TextIO, silent: bool) -> None:
        self.out, self.silent = out, silent

    def __call__(self, name: str, found: Result | None, seconds: float) -> None:
        if self.silent:
            return
        clear = "\r\x1b[K" if self.out.isatty() else ""
        if found is None:
            if clear:
                print(f"....  {name}", end="", file=self.out, flush=True)
            return
        spent = f"  ({seconds:.1f} s)" if seconds >= 1 else ""
        lines = [f"{clear}{found.status}  {name:<11}  {found.seen}{spent}"]
        lines += [f"      {line}" for line in found.details]
        lines += [f"      mend: {found.mend}"] if found.mend else []
        print("\n".join(lines), file=self.out, flush=True)


def _summary(rows: Sequence[dict[str, Any]], seconds: float, debug: bool) -> str:
    count = {status: sum(row["status"] == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    text = f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped in {seconds:.0f} s."
    if count["FAIL"]:
        text += " For a bug report: prerl doctor --json"
        text += "" if debug else "; PRERL_DEBUG=1 shows tracebacks and what the libraries print"
    return text


def _report(own: argparse.Namespace, rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    try:
        from prerl_lightning.callbacks.record import machine, versions

        about: dict[str, Any] = {"machine": machine(), "versions": versions()}
    except Exception as error:  # of what is broken here, the checks tell
        about = {"machine": {"system": platform.platform()}, "versions": {"error": discreet(first_line(error))}}
    return {
        "format": 1,
        "prerl": __version__,
        "config": [Path(file).name for file in own.config],
        "model": discreet(own.model) if own.model else None,
        **about,
        "failed": sum(row["status"] == "FAIL" for row in rows),
        "seconds": round(seconds, 1),
        "checks": list(rows),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
