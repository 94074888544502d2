"""Makes the embedded model: a Llama of 0.86 M parameters, pre-trained from scratch on data/arithmetic.py's corpus.

    python -m prerl_lightning.data.pretrain OUT_DIR

One core, seeded: 1,800 steps of 96 documents take about 500 CPU seconds and end at a held-out avg@8 of 0.385
(temperature 1, 128 problems). Most writers of the corpus are careless, and wrong wherever a carry or borrow occurs:
RL is left something to do.
"""

import argparse
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prerl_lightning.data.arithmetic import ArithmeticProblems, document
from prerl_lightning.rewards.arithmetic import arithmetic_reward

log = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-=?#;\n waitchek"
PAD, BOS, EOS, UNK = range(len(SPECIAL))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; BOS in front."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(CHARACTERS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """head_dim 32 is the smallest that vLLM's CPU attention takes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # near 1 / sqrt(hidden size); the default is made for wide models and starts slowly
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int) -> Iterator[torch.Tensor]:
    """(size, L) ids with BOS and EOS, padded on the right; documents of like length share a batch."""
    while True:
        rows = sorted(([*tokenizer(document(rng))["input_ids"], EOS] for _ in range(8 * size)), key=len)
        cut = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(cut)
        for batch in cut:
            width = len(batch[-1])
            yield torch.tensor([row + [PAD] * (width - len(row)) for row in batch])


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: int = 128, k: int = 8) -> float:
    """Held-out avg@k at temperature 1."""
    held_out = ArithmeticProblems("held_out", problems)
    prompts = [held_out[i] for i in range(problems)]
    ids = torch.tensor([tokenizer(p.prompt)["input_ids"] for p in prompts])  # all questions have 10 characters
    rows = cast(Any, model).generate(ids, do_sample=True, top_k=0, num_return_sequences=k, max_new_tokens=64)
    texts = tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
    right = [arithmetic_reward("", text, prompts[i // k].ground_truth, {}) for i, text in enumerate(texts)]
    return sum(right) / len(right)


def pretrain(out: Path, steps: int, documents: int, lr: float, seed: int) -> None:
    """AdamW with warm-up and cosine decay to a tenth."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(f"corpus {seed}")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    corpus = batches(tokenizer, rng, documents)
    started, loss_sum = time.process_time(), 0.0
    for step in range(1, steps + 1):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 100) * decay
        ids = next(corpus)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum += float(loss.detach())
        if step % 100 == 0:
            log.info("step %d, loss %.4f, %.0f CPU seconds", step, loss_sum / 100, time.process_time() - started)
            loss_sum = 0.0
        if step % 200 == 0 or step == steps:
            model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            log.info("step %d, held-out avg@8 %.3f", step, accuracy(model.eval(), tokenizer))
            model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--documents", type=int, default=96, help="in a batch")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(args.out, args.steps, args.documents, args.lr, args.seed)


if __name__ == "__main__":
    main()
