"""``prerl job``: `prerl fit` on machines of Lightning AI, resumed by itself when they are taken away.

    prerl job --config my.yaml --machine H100 --studio my-studio --interruptible
    prerl job --config my.yaml --machine H100 --studio my-studio --dry_run --script job.sh

What is sent is one script for a shell: the set-up of `make`, the configuration files and what they name of this folder,
and ``prerl fit --ckpt_path auto`` in the job's own folder. It runs as far as the parsed configuration here before it is
sent anywhere. NOT RUN ON THE PLATFORM BY US: arguments and request are held against lightning-sdk 2026.10.13, the
script is run, killed and resumed on a plain machine (tests/test_jobs.py).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prerl_lightning.errors import ArgumentParser, InputError, in_one_line, is_name, nearest
from prerl_lightning.jobs.files import SECRET, add_all, arguments_and_files
from prerl_lightning.jobs.script import script
from prerl_lightning.secrets import HIDDEN, hide_in_command, hide_in_text

ATTEMPTS = 10


def job(args: Sequence[str]) -> None:
    """Run the command: send the job, and print where it is; with ``--dry_run`` print what would be sent.

    Raises:
        InputError: what is given does not fit together, the script does not get as far as a parsed configuration here,
            or the platform refuses it.
    """
    own, rest = _parser().parse_known_args(args)
    machine = _machine(own.machine, needed=not own.dry_run)
    arguments = of_job(own, rest)
    _try(arguments["command"])
    if own.script:
        try:
            Path(own.script).write_text(arguments["command"], encoding="utf-8")
        except OSError as error:
            raise InputError(f"--script: {own.script}: {error.strerror}.") from None
    if own.dry_run:
        print("\n".join(_listed(arguments, own.script)))
        if machine is None:
            print(f"Whether there is a machine {own.machine} was not looked at: lightning-sdk is not installed here.")
        again = f"PRERL_DRY_RUN=FOLDER sh {own.script} does that again" if own.script else "--script FILE has it alone"
        print(f"Run here as far as `prerl fit --print_config`, without the set-up ({again}); nothing was sent.")
        return
    sent = send({**arguments, "machine": machine})
    if sent.name != own.name:
        print(f"The name {own.name} was taken: the job is {sent.name}, and a new machine would not find its files.")
    print("\n".join(_follow_up(sent, own)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "prerl job",
        description="Run prerl fit on machines of Lightning AI. Needs `pip install lightning-sdk`, but for --dry_run.",
        epilog="All else goes to prerl fit: --config FILE, --KEY VALUE.",
    )
    add = parser.add_argument
    add("--machine", required=True, help="of lightning-sdk, e.g. L4, H100 or H100_X_8")
    add("--num_machines", type=int, default=1, metavar="N", help="each with all its GPUs; default: 1")
    add("--interruptible", action="store_true", help="cheaper; may be taken away, and then goes on on another")
    add(
        "--max_run_attempts",
        type=int,
        metavar="N",
        help=f"default: {ATTEMPTS} with --interruptible, else the platform's",
    )
    add("--name", help="of the job and of its folder; default: the first configuration's and the time")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--studio", help="whose files and packages it has; default: the one that this is started in")
    where.add_argument("--image", help="a container image that has this repository's clone")
    add("--teamspace", metavar="OWNER/NAME", help="default: the one of `lightning-sdk config`")
    add(
        "--source",
        metavar="FOLDER|URL",
        help="this repository on the machine, or where git clones it from; default: ~/prerl-lightning in a Studio, "
        "/prerl-lightning in an image",
    )
    add("--folder", help="on the machine: where the job's folder NAME is made; default, in a Studio: its artifacts")
    add("--files", action="append", default=[], metavar="PATH", help="one more file or folder of here; repeatable")
    add("--env", action="append", default=[], metavar="NAME", help="a variable of this shell to hand on; repeatable")
    add(
        "--path_mappings",
        action="append",
        default=[],
        metavar="FOLDER=CONNECTION[:PATH]",
        help="of an image: a folder of the machine that is a data connection's; repeatable",
    )
    add("--no_reuse_snapshot", action="store_true", help="take the Studio as it is now, which takes longer to start")
    add("--dry_run", action="store_true", help="print what would be sent")
    add("--script", metavar="FILE", help="write the script there; a dry run then leaves it out of what it prints")
    return parser


def of_job(own: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """The arguments of lightning-sdk's ``Job.run``, the machine by its name. Fills in ``own.name``.

    Args:
        rest: the arguments of `prerl fit`.
    """
    if not own.image and not own.studio and not os.environ.get("LIGHTNING_CLOUD_SPACE_ID"):
        raise InputError("prerl job: where? Give --studio NAME or --image IMAGE, or start it in a Studio.")
    for option, least in (("num_machines", 1), ("max_run_attempts", 1)):
        if (given := getattr(own, option)) is not None and given < least:
            raise InputError(f"--{option}: {given} must be a whole number of at least {least}.")
    if own.folder is None and (own.image or own.num_machines > 1):
        who = "--num_machines: the machines need one folder" if own.num_machines > 1 else "--image: it keeps no files"
        raise InputError(
            f"{who}. Give --folder one that is kept and shared, such as a data connection's in /teamspace of a "
            "Studio, or one of --path_mappings in an image."
        )
    if own.folder is not None and not re.fullmatch(r"/[\w./-]*", own.folder):
        raise InputError(f"--folder: {own.folder} must begin with /, as it is of the machine, and have no blanks.")
    if own.path_mappings and not own.image:
        raise InputError("--path_mappings: of an --image; in a Studio data connections lie in /teamspace.")
    for name in own.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name not in os.environ:
            raise InputError(f"--env: {hide_in_text(name)} is no variable of this shell. Give its name; export it.")
    if [*rest] != hide_in_command(rest) or hide_in_text(own.source or "") != (own.source or ""):
        raise InputError(f"prerl job: a key or password among its arguments {SECRET}.")
    if any(re.match(r"--ckpt_path\b", word) for word in rest):
        raise InputError(
            "--ckpt_path: a job goes on from its own last checkpoint. To start from other weights, export them and "
            "give --model.init_args.model."
        )
    files: dict[str, Path] = {}
    fit, configurations = arguments_and_files(rest, files)
    if not configurations:
        raise InputError("prerl job: give --config FILE.")
    for given in own.files:
        add_all(files, given, "--files")
    own.name = own.name or re.sub(r"[^\w-]", "-", f"{Path(configurations[0]).stem}-{time.strftime('%m%d-%H%M%S')}")
    if not is_name(own.name):
        raise InputError(f"--name: {own.name!r} must be of letters, digits, dots and dashes.")
    if own.num_machines > 1:
        fit += ["--trainer.num_nodes", str(own.num_machines)]
    mappings = [each.partition("=") for each in own.path_mappings]
    attempts = own.max_run_attempts or (ATTEMPTS if own.interruptible else None)
    return {
        "name": own.name,
        "machine": own.machine,
        "num_machines": own.num_machines,
        "interruptible": own.interruptible,
        "max_run_attempts": attempts,
        "studio": own.studio,
        "image": own.image,
        "teamspace": own.teamspace,
        "env": {name: os.environ[name] for name in own.env},
        "path_mappings": {folder: connection for folder, _, connection in mappings} or None,
        "reuse_snapshot": not own.no_reuse_snapshot,
        "command": script(own, fit, files),
    }


def _try(command: str) -> None:
    """Run the script here as far as the parsed configuration. Raises InputError with what it says where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "0"}
        env = {**os.environ, **ranks, "PRERL_DRY_RUN": folder, "PATH": path}
        tried = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, check=False)
        if tried.returncode:
            said = (tried.stderr.strip() or tried.stdout.strip()).replace(f"{folder}/", "")
            raise InputError(f"{said}\nprerl job: its script ends with {tried.returncode} here; nothing was sent.")


def _machine(name: str, needed: bool) -> Any:
    """lightning-sdk's; None where that is not there, and not ``needed``."""
    if find_spec("lightning_sdk") is None:
        if needed:
            raise InputError("prerl job: needs the package lightning_sdk: pip install lightning-sdk")
        return None
    from lightning_sdk import Machine

    machines = {known: machine for known, machine in vars(Machine).items() if isinstance(machine, Machine)}
    if name not in machines:
        raise InputError(f"--machine: {name}: lightning-sdk has none of this name.{nearest(name, machines)}")
    return machines[name]


def send(arguments: Mapping[str, Any]) -> Any:
    """To lightning-sdk, whose Job is given back. Raises InputError for what it or the platform refuses."""
    from lightning_sdk import Job, Teamspace

    try:
        # as text OWNER/NAME would be no Studio's: Job.run compares it with the name alone
        teamspace = arguments["teamspace"] and Teamspace(arguments["teamspace"])
        return Job.run(**{**arguments, "teamspace": teamspace})
    except Exception as error:  # of its own, of its client, of HTTP
        said = in_one_line(error, most=10_000)
        for value in filter(None, arguments["env"].values()):
            said = said.replace(value, HIDDEN)
        raise InputError(f"prerl job: not sent: {said[:300]} If it does not know you: lightning-sdk login") from None


def _listed(arguments: Mapping[str, Any], script_file: str | None) -> Iterator[str]:
    """What would be sent; of variables the names alone, of a script that is in a file that."""
    width = max(map(len, arguments)) + 2
    for name, value in arguments.items():
        if name == "env":
            value = ", ".join(f"{variable} (of this shell)" for variable in value) or None
        if name != "command" and value is not None:
            yield f"{name:{width}}{value}"
    yield f"{'command':{width}}" + (script_file or f"\n{arguments['command']}")


def _follow_up(sent: Any, own: argparse.Namespace) -> Iterator[str]:
    of = f" --teamspace {own.teamspace}" if own.teamspace else ""
    yield f"job     {sent.link}"
    yield f"logs    lightning-sdk job logs {sent.name} --follow{of}"
    yield f"stop    lightning-sdk job stop {sent.name}{of}"
    if own.folder is None and (kept := sent.artifacts_uri):
        yield f"report  lightning-sdk cp -r {kept}/{own.name}/runs runs-{own.name}"
        yield f"        prerl report runs-{own.name} -o report.html"
    else:
        yield f"report  prerl report {own.folder}/{own.name}/runs -o report.html, where that folder is"
