"""Tokens a second of a rollout, weight update included, over bare `LLM.generate` on the same prompts.

    python benchmarks/engine.py MODEL_FOLDER

Both in one process and engine, in turns: ours gives the engine all weights of the policy and samples with log-probs and
a seed for each response; the bare side samples without log-probs. 16 prompts x 8 responses of up to 128 tokens.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from machine import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from prerl_lightning.policy.model import Policy, load_tokenizer
    from prerl_lightning.rollout.engine import Place, Sampling
    from prerl_lightning.rollout.vllm_engine import VLLMEngine

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    policy, tokenizer = Policy.from_pretrained(args.model), load_tokenizer(args.model)
    engine = VLLMEngine(dtype="bfloat16", max_model_len=256, kv_cache_mib=512, sleep_between_rollouts=False)
    engine.start(args.model, 0, Place(device=device))
    policy.to(device)
    from vllm import SamplingParams, TokensPrompt

    questions = [[{"role": "user", "content": f"Tell a long story about the number {i}."}] for i in range(16)]
    texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
    prompts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    sampling = Sampling(group_size=8, max_new_tokens=args.new_tokens)
    figures: dict[str, list[float]] = {"ours": [], "bare": [], "update_seconds": [], "rollout_seconds": []}
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        engine.update_weights(policy.named_weights(engine.weights_dtype), repeat)
        updated = time.perf_counter()
        groups = engine.generate(prompts, sampling, [1000 * repeat + 10 * i for i in range(16)])
        end = time.perf_counter()
        ours = sum(len(r.token_ids) for g in groups for r in g) / (end - start)
        params = [SamplingParams(n=8, temperature=1.0, max_tokens=args.new_tokens, seed=10 * i) for i in range(16)]
        start_bare = time.perf_counter()
        outputs = engine._llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        bare = sum(len(c.token_ids) for o in outputs for c in o.outputs) / (time.perf_counter() - start_bare)
        if repeat:  # the first warms both up
            for key, value in zip(figures, (ours, bare, updated - start, end - start), strict=True):
                figures[key].append(value)
            print(f"ours {ours:.0f}, bare {bare:.0f} tokens/s; update {updated - start:.2f} s", flush=True)
    result = {k: round(statistics.median(v), 3) for k, v in figures.items()}
    result["ratio"] = round(statistics.median(a / b for a, b in zip(figures["ours"], figures["bare"], strict=True)), 3)
    print(result)
    args.out.write_text(json.dumps({**result, "model": Path(args.model).name, "machine": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
