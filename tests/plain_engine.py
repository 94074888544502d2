"""An engine of plain words: a second Hugging Face model, one token at a time. For runs of milliseconds."""

import torch
from transformers import AutoModelForCausalLM

from prerl_lightning.rollout.engine import Engine
from prerl_lightning.rollout.vllm_engine import decode
from prerl_lightning.types import Response


class PlainEngine(Engine):
    """Args:
    replay: prompts' responses by position, as (token ids, log-probs), instead of samples; log-probs None: the model's.
    """

    def __init__(self, limit=64, replay=None):
        self.limit, self.replay = limit, replay
        self.model = None
        self.n_updates = 0

    def max_model_len(self, config):
        return self.limit

    def start(self, model, seed, place):
        from prerl_lightning.policy.model import load_tokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer, self.weights_dtype = load_tokenizer(model), torch.float32

    @torch.no_grad()
    def log_probs(self, ids, temperature):
        return (self.model(torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)

    def generate(self, prompts, sampling, seeds, greedy=False, on_group=None):
        groups = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            group = []
            for g in range(1 if greedy else sampling.group_size):
                generator = torch.Generator().manual_seed((seed + g) % 2**63)
                ids, found = list(prompt), []
                script = None if self.replay is None else self.replay[i][g]
                length = sampling.max_new_tokens if script is None else len(script[0])
                for t in range(length):
                    p = self.log_probs(ids, 1.0 if greedy else sampling.temperature)[-1]
                    token = int(p.argmax()) if greedy else int(torch.multinomial(p.exp(), 1, generator=generator))
                    token = token if script is None else script[0][t]
                    ids.append(token)
                    found.append(float(p[token]))
                    if token == self.tokenizer.eos_token_id and script is None:
                        break
                if script is not None and script[1] is not None:
                    found = script[1]
                own = ids[len(prompt) :]
                text = decode(self.tokenizer, prompt, [own])[0]
                group.append(Response(own, found, text, own[-1] != self.tokenizer.eos_token_id))
            groups.append(group)
            if on_group is not None:
                on_group(i, group)
        return groups

    @torch.no_grad()
    def update_weights(self, named_weights, policy_version):
        state = self.model.state_dict()
        for name, tensor in named_weights:
            state[name].copy_(tensor)
        self.policy_version, self.n_updates = policy_version, self.n_updates + 1

    def forget(self):
        pass

    def stop(self):
        self.model = self.weights_dtype = self.policy_version = None
