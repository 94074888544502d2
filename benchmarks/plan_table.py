"""The table of docs/guides/plan.md: 4B, 8B, 32B and 70B on 1, 8 and 64 GPUs, computed by `prerl plan`; none was run.

    python benchmarks/plan_table.py             # writes it into docs/guides/plan.md

Shapes are those of the public config.json of Qwen3-4B, -8B and -32B and of Llama-3.1-70B. GRPO, 128 prompts of up to
1,024 tokens x 8 responses of up to 3,072, fsdp2 on H100 (80 GB) beyond one GPU, everything else as it is by default.
"""

import os
import sys
import tempfile
from pathlib import Path

import transformers
import yaml

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "plan.md"
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
MODELS = {  # class, layers, hidden, intermediate, heads, other options
    "Qwen3-4B": ("Qwen3Config", 36, 2560, 9728, 32, QWEN3 | {"tie_word_embeddings": True}),
    "Qwen3-8B": ("Qwen3Config", 36, 4096, 12288, 32, QWEN3 | {"tie_word_embeddings": False}),
    "Qwen3-32B": ("Qwen3Config", 64, 5120, 25600, 64, QWEN3 | {"tie_word_embeddings": False}),
    "Llama-3.1-70B": (
        *("LlamaConfig", 80, 8192, 28672, 64),
        {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
}
RUN = {
    "data": {
        "train": {"class_path": "CountdownProblems", "init_args": {"split": "train", "size": 4096}},
        "prompts_per_step": 128,
        "max_prompt_tokens": 1024,
        "sampling": {"group_size": 8, "max_new_tokens": 3072},
        "engine": {"class_path": "VLLMEngine", "init_args": {"max_model_len": 4096}},
    }
}
HEAD = ("model", "GPUs", "rollout", "training", "pack", "step", "host, loading", "fits")


def main() -> None:
    sys.argv = ["prerl"]
    os.environ["PRERL_DEBUG"] = ""
    rows = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    with tempfile.TemporaryDirectory() as temporary:
        rows += [row(name, gpus, Path(temporary)) for name in MODELS for gpus in (1, 8, 64)]
    before, _, rest = GUIDE.read_text().partition("<!-- computed -->\n")
    after = rest.partition("<!-- end of computed -->")[2]
    GUIDE.write_text(f"{before}<!-- computed -->\n" + "\n".join(rows) + f"\n<!-- end of computed -->{after}")


def row(name: str, gpus: int, folder: Path) -> str:
    from prerl_lightning.planning.parts import Asked, planned

    kind, layers, hidden, intermediate, heads, more = MODELS[name]
    config = getattr(transformers, kind)(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, **more
    )
    config.save_pretrained(folder / name)
    file = folder / "run.yaml"
    model = {"class_path": "GRPO", "init_args": {"model": str(folder / name)}}
    file.write_text(yaml.safe_dump(RUN | {"model": model, "trainer": {"strategy": "fsdp2" if gpus > 1 else "auto"}}))
    found = planned(Asked.of_files([str(file)], on_gpu=True), "H100", gpus)
    gib = {phase: f"{sum(parts.values()) / 2**30:,.0f} GiB" for phase, parts in found.memory.phases.items()}
    how = ", recomputed" if found.memory.pack.checkpointing else ""
    fits = "yes" if found.fits else "no: the engine's weights are larger than a GPU"
    if found.lower and found.lower[-1][2]:
        fits = "with " + "; ".join(words.rpartition("init_args.")[2] for words, *_ in found.lower)
    assert found.seconds is not None
    took = f"{found.seconds.step / 60:.1f} min" if found.fits else "-"
    return (
        f"| {name} | {gpus} | {gib['rollout']} | {gib['training']} | {found.memory.pack.tokens:,}{how} | {took} | "
        f"{found.host['loading'] / 2**30:,.0f} GiB | {fits} |"
    )


if __name__ == "__main__":
    main()
