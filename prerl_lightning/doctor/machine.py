"""Checks of the machine. Packages are imported within them, since what is broken may be their import."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any

from prerl_lightning.doctor.subject import GIB, Result, Subject, first_line, result, skipped
from prerl_lightning.doctor.versions import cause, driver, hidden
from prerl_lightning.planning.host import available_memory


def accelerator(subject: Subject) -> Result:
    import torch

    from prerl_lightning.callbacks.record import machine

    if torch.cuda.is_available():
        return _gpus()
    about = machine()
    fast = about["instructions"]
    figures = {name: about[name] for name in ("cpu", "cores", "instructions")}
    if torch.version.cuda is not None and (driver().gpus or driver().problem):
        try:
            torch.cuda.init()
            problem = "no reason is given"
        except Exception as error:
            problem = first_line(error)
        said = f"torch (CUDA {torch.version.cuda}) sees no GPU: {problem}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        details = [f"driver {driver().version or 'silent'}: {', '.join(driver().gpus) or driver().problem}"]
        details += [f"CUDA_VISIBLE_DEVICES={visible}"] if visible is not None else []
        return Result("FAIL", said, cause(f"{problem} {driver().problem}"), figures, tuple(details))
    text = f"CPU: {about['cpu']}, {about['cores']} cores, {', '.join(fast) or 'no AVX2'}"
    text += "; GPUs are hidden by CUDA_VISIBLE_DEVICES" if hidden() else ""
    return Result("PASS", text, figures=figures)


def _gpus() -> Result:
    """Each that is visible: its figures, and whether it multiplies matrices."""
    import torch

    from prerl_lightning.metrics.utilisation import peak_flops

    rows: list[dict[str, Any]] = []
    lines, mends = [], []
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        peak = peak_flops(device)
        bf16 = about.major >= 8  # torch's own question counts emulation too
        row = {"name": about.name, "free_gib": round(free / GIB, 1), "total_gib": round(total / GIB, 1)}
        row |= {"capability": f"{about.major}.{about.minor}", "bf16": bf16}
        row["peak_tflops"] = peak / 1e12 if peak else None
        rows.append(row)
        known = f"{peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown: train/mfu needs model.init_args.peak_flops"
        lines.append(
            f"cuda:{i} {row['name']}, {row['free_gib']} of {row['total_gib']} GiB free, capability "
            f"{row['capability']}, {'bf16' if bf16 else 'no bf16'}, {known}"
        )
        try:
            ones = torch.ones(256, 256, device=device, dtype=torch.bfloat16 if bf16 else torch.float16)
            right = bool((ones @ ones == 256).all())
        except Exception as error:  # no kernel image for this GPU, ECC, a GPU that fell off the bus
            lines.append(f"cuda:{i}: {first_line(error)}")
            right = False
            if "no kernel image" in str(error):
                built = ", ".join(torch.cuda.get_arch_list())
                mends.append(f"torch here is built for {built}: take one for this GPU.")
        if not right:
            mends.append(f"cuda:{i} does not compute; see dmesg, and leave it out with CUDA_VISIBLE_DEVICES.")
        if not bf16:
            lines.append(f"cuda:{i}: train with --trainer.precision 32-true; bf16 would be emulated, slowly")
    text = f"{len(rows)} GPU{'s' if len(rows) > 1 else ''}, driver {driver().version or 'unknown'}, "
    text += f"CUDA {torch.version.cuda}"
    return Result(
        "FAIL" if mends else "PASS",
        text,
        " ".join(mends),
        {"driver": driver().version, "cuda": torch.version.cuda, "gpus": rows},
        tuple(lines),
    )


# ---------------------------------------------------------------------- compiler


def compiler(subject: Subject) -> Result:
    """Triton compiles a piece of C against Python.h at the first kernel, and links it to the driver's library."""
    if not driver().gpus and not subject.on_gpu:
        return skipped("only GPUs need one, for Triton's kernels")
    program = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)
    if program is None or shutil.which(program) is None:
        seen = f"CC={program} is no program" if program else "neither gcc nor clang on PATH, and CC is not set"
        other = f" There is {shutil.which('cc')}: export CC=cc." if shutil.which("cc") else ""
        return result(seen, [f"Debian, Ubuntu: sudo apt-get install gcc.{other}"])
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folder = sysconfig.get_paths(scheme)["include"]
    command = [program, "-I", folder, "-fsyntax-only", "-x", "c", "-"]
    tried = subprocess.run(
        command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60, check=False
    )
    if tried.returncode:
        errors = [line for line in tried.stderr.splitlines() if "error" in line] or tried.stderr.splitlines()
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        mend = (
            f"Debian, Ubuntu: sudo apt-get install {python}-dev libc6-dev; or a Python that brings its headers (uv's)."
        )
        seen = "{compiler} does not compile against Python.h: {error}"
        return result(seen, [mend], compiler=program, error=(errors or ["?"])[0])
    try:
        import_module("triton.backends.nvidia.driver").libcuda_dirs()
    except Exception as error:
        mend = "sudo ldconfig, or TRITON_LIBCUDA_PATH=the folder with libcuda.so.1."
        return result("Triton does not find the driver's library: {error}", [mend], error=first_line(error))
    return result("{compiler}, Python.h, libcuda", compiler=program)


# ---------------------------------------------------------------------- memory and disk


def memory(subject: Subject) -> Result:
    """Of the host, and on disk for two checkpoints; a GPU that others fill."""
    import torch

    from prerl_lightning.budget import checkpoint_bytes

    mends, free = [], available_memory()
    if free < 2 * GIB:
        mends.append("Less than 2 GiB of host memory: end other processes, or give the container more.")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    gpus = torch.cuda.device_count() if subject.on_gpu else 0
    if gpus > 1 and shared < GIB:
        mends.append("NCCL's ranks talk through /dev/shm: docker run --shm-size=8g (or --ipc=host).")
    options = subject.configured.config_init["fit"]["trainer"] if subject.configured else {}
    root = Path(options.get("default_root_dir") or "runs").resolve()
    there = next(p for p in (root, *root.parents) if p.is_dir())
    disk, needed = shutil.disk_usage(there).free, 2 * checkpoint_bytes(subject.shape)
    if not os.access(there, os.W_OK):
        mends.append("The folder for runs cannot be written: cd to another, or --trainer.default_root_dir DIR.")
    if disk < needed:
        mends.append(
            "Two checkpoints do not fit on this disk: --trainer.default_root_dir DIR on a larger one, or "
            "--checkpoint.save_weights_only true (a third, not to be resumed from)."
        )
    for i in range(gpus):
        left, total = torch.cuda.mem_get_info(i)
        if left < total / 2:
            mends.append(
                f"Of cuda:{i} {(total - left) / GIB:.1f} of {total / GIB:.1f} GiB are taken, and the engine's share is "
                "half: nvidia-smi shows by what; CUDA_VISIBLE_DEVICES takes another GPU, or lower "
                "data.engine.init_args.gpu_memory_utilization."
            )
    return result(
        "host memory {host_gib:.1f} GiB free, /dev/shm {shm_gib:.2f} GiB, disk for runs {disk_gib:.1f} GiB free; two "
        "checkpoints of {parameters:,} parameters need {checkpoints_gib:.2f} GiB",
        mends,
        host_gib=free / GIB,
        shm_gib=shared / GIB,
        disk_gib=disk / GIB,
        parameters=subject.shape.parameters,
        checkpoints_gib=needed / GIB,
    )
