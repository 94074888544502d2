"""A tiny Llama, pre-trained from scratch on a `Corpus`, in stages.

One core and seeded: the same machine makes the same weights. A batch holds documents of like length and about so many
tokens, whatever their number, so that each token counts the same: with a fixed number of documents, and a mean over
tokens, long ones count less.
"""

import logging
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prerl_lightning.data.tasks.corpus import Corpus, Stage

log = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(len(SPECIAL))
POOL = 16  # batches that are drawn and sorted by length together
MOST = 256  # positions of the model


def make_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Cuts text into these, the longest first; BOS in front."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(tokens)])}
    longest_first = sorted(tokens, key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join([*(re.escape(token) for token in longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=MOST,
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
        max_position_embeddings=MOST,
        tie_word_embeddings=True,
        initializer_range=0.06,  # near 1 / sqrt(hidden size); the default is made for wide models and starts slowly
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: random.Random, tokens: int
) -> Iterator[torch.Tensor]:
    """(n, L) ids with BOS and EOS, padded on the right, n * L up to ``tokens``."""
    while True:
        rows: list[list[int]] = []
        while sum(map(len, rows)) < POOL * tokens:
            rows += ([*cast(Any, tokenizer(corpus.document(rng)))["input_ids"], EOS] for _ in range(256))
        cut: list[list[list[int]]] = [[]]
        for row in sorted(rows, key=len):
            if len(cut[-1]) + 1 > tokens // len(row):
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for batch in filter(None, cut):
            width = len(batch[-1])
            yield torch.tensor([row + [PAD] * (width - len(row)) for row in batch])


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, problems: int, k: int = 8
) -> dict[str, float]:
    """Held-out avg@k and pass@k at temperature 1, and the corpus's `habits`; the caller's random state stays."""
    held_out = corpus.held_out(problems)
    reward = held_out.reward
    assert reward is not None
    asked = sorted(((tokenizer(cast(str, p.prompt))["input_ids"], p) for p in held_out), key=lambda pair: len(pair[0]))
    answers: list[tuple[str, str]] = []
    solved: list[list[bool]] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _, group in groupby(asked, key=lambda pair: len(pair[0])):  # no padding in front
            some = list(group)
            ids = torch.tensor([row for row, _ in some])
            rows = cast(Any, model).generate(
                ids, do_sample=True, top_k=0, num_return_sequences=k, max_length=MOST, eos_token_id=EOS
            )
            texts = tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
            ended = (rows[:, ids.shape[1] :] == EOS).any(1).tolist()
            for i, (_, problem) in enumerate(some):
                of_problem = range(i * k, (i + 1) * k)
                answers += [(problem.ground_truth, texts[j]) for j in of_problem]
                extra = [{**problem.extra, "truncated": not ended[j]} for j in of_problem]
                scores = [reward("", texts[j], problem.ground_truth, e) for j, e in zip(of_problem, extra, strict=True)]
                solved.append([score >= 1 for score in scores])
    found = {f"avg@{k}": sum(map(sum, solved)) / (problems * k), f"pass@{k}": sum(map(any, solved)) / problems}
    return found | corpus.habits(answers)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, rng: random.Random
) -> Iterator[int]:
    """One stage; yields the number of each step done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.01)
    corpus = batches(stage.corpus, tokenizer, rng, stage.tokens)
    started, loss_sum = time.process_time(), 0.0
    for step in range(1, stage.steps + 1):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(1.0, step / stage.warmup) * decay
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
        yield step


def pretrained(stages: Sequence[Stage], out: Path, seed: int, measure_every: int, problems: int) -> None:
    """Write the model and its tokenizer into ``out``, and measure it by ``problems`` held-out ones, every so many steps
    (0: never) and at the end of each stage."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(stages[0].corpus.tokens)
    model = make_model(len(tokenizer))
    for number, stage in enumerate(stages):
        log.info("stage %d of %d: %s, %d steps", number + 1, len(stages), type(stage.corpus).__name__, stage.steps)
        for step in train(model, tokenizer, stage, random.Random(f"corpus {seed} {number}")):
            if step == stage.steps or (measure_every and step % measure_every == 0):
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
                found = measure(model.eval(), tokenizer, stage.corpus, problems)
                log.info("step %d: %s", step, ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
                model.train()
