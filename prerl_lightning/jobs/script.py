"""The script of a job. It needs a shell, git, make and what `make` needs, and of the platform nothing but the places
where files are kept: so it runs here too."""

import base64
import hashlib
import re
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from prerl_lightning import __version__
from prerl_lightning.errors import InputError
from prerl_lightning.jobs.files import packed

MOST = 120_000  # bytes: Linux takes 131,071 in one argument

SCRIPT = """\
# prerl job {name}, of prerl-lightning {version}
set -eu
work="${{PRERL_DRY_RUN:-{folder}}}/{name}"
{before}mkdir -p "$work"

if [ ! -e "$work/.files-{digest}" ]; then
  if [ "${{NODE_RANK:-0}}" = 0 ]; then
    base64 -d <<'FILES' | tar -xzf - -C "$work"
{files}
FILES
    touch "$work/.files-{digest}"
  else
    until [ -e "$work/.files-{digest}" ]; do sleep 1; done
  fi
fi

if [ -z "${{PRERL_DRY_RUN:-}}" ]; then
{source}
  make setup
  PATH="$PWD/.venv/bin:$PATH"
fi

cd "$work"
# in the place of this shell, so that it is prerl that SIGTERM reaches
exec prerl fit {arguments} --ckpt_path auto ${{PRERL_DRY_RUN:+--print_config}}
"""
ARTIFACTS = "${LIGHTNING_ARTIFACTS_DIR:?is not set: give prerl job a --folder that is kept}"
KEPT = """
# an earlier attempt may have run on another machine, whose artifacts the platform shows there
kept=/teamspace/jobs/{name}/{name}
if [ ! -e "$work" ] && [ -d "$kept" ]; then
  echo "[job] goes on from the files in $kept"
  # with their times, by which the newest checkpoint is found
  cp -a "$kept" "$work"
fi
"""
MACHINES = """
: "${MASTER_ADDR:?} ${MASTER_PORT:?} ${NODE_RANK:?}"
unset RANK LOCAL_RANK WORLD_SIZE # of one process a machine; Lightning starts its ranks itself
"""


def script(own: Namespace, arguments: Sequence[str], files: Mapping[str, Path]) -> str:
    """For ``sh``. Without PRERL_DRY_RUN it sets up the environment; with it the folder that it names is the job's, and
    nothing is trained."""
    sizes = sorted(((path.stat().st_size, place) for place, path in files.items()), reverse=True)
    # text becomes a fifth or so; a model's folder is not read only to be refused
    held = packed(files) if sum(size for size, _ in sizes) < 20 * MOST else bytes(MOST)
    made = SCRIPT.format(
        name=own.name,
        version=__version__,
        folder=own.folder or ARTIFACTS,
        before=(MACHINES if own.num_machines > 1 else "") + (KEPT.format(name=own.name) if not own.folder else ""),
        digest=hashlib.sha256(held).hexdigest()[:12],
        files="\n".join(re.findall(".{1,76}", base64.b64encode(held).decode())),
        source=_source(own.source or ("/prerl-lightning" if own.image else "prerl-lightning")),
        arguments=shlex.join(arguments),
    )
    if len(made.encode()) > MOST:
        raise InputError(
            f"prerl job: with its files the script is longer than the {MOST:,} bytes that go into a job. The largest: "
            f"{', '.join(f'{place} ({size:,} bytes)' for size, place in sizes[:3])}. Put those into the Studio or a "
            "data connection, and name them by their place there, which begins with /."
        )
    return made


def _source(given: str) -> str:
    """Into the clone on the machine, made first where ``given`` is what git clones from."""
    if "://" not in given and not given.startswith("git@"):
        return f"  cd ~\n  cd {shlex.quote(given)}"
    return (
        f"  cd ~\n  [ -d prerl-lightning ] || git clone -q {shlex.quote(given)} prerl-lightning\n  cd prerl-lightning"
    )
