"""Host memory of two fsdp2 ranks (gloo) with a model of 0.5 B parameters: as it loads, and as a checkpoint is written.

    python benchmarks/sharded_memory.py

Random weights of Qwen2.5-0.5B's shape, stored in bf16 as on the hub. ``whole``: each rank loads all of it before it is
sharded, and rank 0 writes one file from gathered tensors; ``shards``: each rank reads and writes its own. Optimizer
states are AdamW's. The peak is the kernel's VmHWM, reset before each stage; it counts mapped pages of files too. What
is ``held`` behind a stage is counted once glibc has given back what it keeps of freed memory (`malloc_trim`).
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "sharded_memory.json"
WAYS = ("whole", "shards")


def peak(reset: bool = False) -> float:
    """GB; with ``reset`` counted anew from here on."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return round(int(lines["VmHWM"].split()[0]) * 1024 / 1e9, 3)


def held() -> float:
    """GB, see above."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak(reset=True)
    return peak()


def run(way: str, rank: int, folder: Path) -> None:
    import lightning as L
    import torch
    import torch.distributed as dist
    from lightning.fabric.plugins.environments import LightningEnvironment
    from torch.distributed.device_mesh import init_device_mesh

    from prerl_lightning.checkpoints import WholeFileIO
    from prerl_lightning.policy.model import Policy
    from prerl_lightning.strategies import FSDP2Strategy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{way}", rank=rank, world_size=2)
    strategy, environment = FSDP2Strategy(), LightningEnvironment()
    environment.set_global_rank(rank)
    environment.set_world_size(2)
    strategy.cluster_environment = environment
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    strategy.sharded_checkpoints, strategy.checkpoint_io = way == "shards", WholeFileIO()
    peak(reset=True)
    found = {"start": peak()}
    policy = Policy.from_pretrained(str(folder / "model"), sharding=strategy if way == "shards" else None)
    if way == "whole":
        strategy.shard(policy)
    found["load"] = peak()
    found["held, loaded"] = held()
    optimizer = torch.optim.AdamW(policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found["training"] = peak()
    found["held, in training"] = held()
    strategy.model, strategy.optimizers = L.LightningModule(), [optimizer]
    strategy.model.policy = policy
    checkpoint = {"state_dict": strategy.lightning_module_state_dict()}
    checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer)]
    if way == "shards":
        strategy.save_checkpoint(checkpoint, folder / "shards.ckpt")
    elif rank == 0:
        strategy.checkpoint_io.save_checkpoint(checkpoint, folder / "whole.ckpt")
    found["save"] = peak()
    dist.barrier()
    print(json.dumps(found))


def convert(folder: Path, form: str) -> None:
    import prerl_lightning.convert as commands

    peak(reset=True)
    start = peak()
    if form == "convert":
        commands.convert([str(folder / "shards.ckpt"), str(folder / "converted.ckpt")])
    else:
        commands.export([str(folder / "shards.ckpt"), str(folder / "exported"), "--model", str(folder / "model")])
    print(json.dumps({"start": start, form: peak()}))


def make(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from prerl_lightning.policy.model import load_tokenizer

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer("embedded").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="for the files, 20 GB; default: a temporary one")
    args = parser.parse_args()
    if args.part:
        kind, *rest = args.part
        if kind == "model":
            return make(args.folder / "model")
        return run(kind, int(rest[0]), args.folder) if kind in WAYS else convert(args.folder, kind)
    from machine import describe

    folder = args.folder or Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))

    def started(*part: str) -> subprocess.Popen:
        command = [sys.executable, __file__, "--folder", str(folder), "--part", *part]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def said(process: subprocess.Popen) -> dict:
        output, _ = process.communicate()
        assert process.returncode == 0, process.args
        return json.loads(output.strip().splitlines()[-1])

    def keep(found: dict) -> None:
        print(found, flush=True)
        RESULTS.write_text(json.dumps({"peak_gb": found, "machine": describe()}, indent=1) + "\n")

    try:
        assert started("model").wait() == 0
        found: dict = {}
        for way in WAYS:
            processes = [started(way, str(rank)) for rank in range(2)]
            found[way] = [said(process) for process in processes]
            keep(found)
        for form in ("convert", "export"):
            found[form] = said(started(form))
            keep(found)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
