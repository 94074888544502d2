"""An engine that is elsewhere: a server that speaks OpenAI's API, such as ``vllm serve``. For evaluation: it can be
given no weights.

The model's tokenizer need not be there: a prompt's token ids are the bytes of what is sent
(`PromptFormat.untokenised`). A text goes to ``/completions``, and a chat, behind a byte 0 and as JSON, to
``/chat/completions`` for the server's own template. Each response is a request of its own, so that the server says how
long it is, and any server will do.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.rollout.engine import Engine, OnGroup, Place, Sampling
from prerl_lightning.types import Response

TRIES = 5
BUSY = (408, 429, 500, 502, 503, 504)


class Endpoint(Engine):
    """Args:
    url: of the API, with its version: ``http://localhost:8000/v1``.
    model: as the server calls it.
    requests: at a time.
    timeout: seconds for one response.
    chat_template_kwargs: sent along with chats, where there are any.

    The environment's OPENAI_API_KEY is sent, where there is one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        requests: int = 32,
        timeout: float = 1800,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint: {url!r} is no URL such as http://localhost:8000/v1.")
        self.url, self.model, self.requests, self.timeout = url.rstrip("/"), model, requests, timeout
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def max_model_len(self, config: PretrainedConfig) -> int:
        raise NotImplementedError("the server's own limit holds, and it says so")

    def start(self, model: str, seed: int, place: Place) -> None:
        """Asks for the models that are served."""
        served = [str(m.get("id")) for m in self._ask("/models", None).get("data", [])]
        if served and self.model not in served:
            raise InputError(f"--model: {self.url} does not serve {self.model!r}, but {', '.join(served)}.")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        greedy: bool = False,
        on_group: OnGroup | None = None,
    ) -> list[list[Response]]:
        """Token ids and log-probs of the responses are zeros, as many as the server counts."""
        if greedy:
            sampling = replace(sampling, group_size=1)
        groups: list[list[Future[Response]]] = []
        with ThreadPoolExecutor(self.requests) as threads:
            try:
                for prompt, seed in zip(prompts, seeds, strict=True):
                    asked = [(bytes(prompt), sampling, (seed + i) % 2**63, greedy) for i in range(sampling.group_size)]
                    groups.append([threads.submit(self._sample, *one) for one in asked])
                done = []
                for i, futures in enumerate(groups):
                    done.append([future.result() for future in futures])
                    if on_group is not None:
                        on_group(i, done[-1])
                return done
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _sample(self, prompt: bytes, sampling: Sampling, seed: int, greedy: bool) -> Response:
        chat = prompt.startswith(b"\0")
        body: dict[str, Any] = {
            "model": self.model,
            **({"messages": json.loads(prompt[1:])} if chat else {"prompt": prompt.decode()}),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if greedy else sampling.temperature,
            "seed": seed,
        }
        if not greedy:
            body["top_p"] = sampling.top_p
        # not of OpenAI's own API: sent only where they say something
        further = {"top_k": 0 if greedy else sampling.top_k, "stop": sampling.stop}
        further |= {"stop_token_ids": sampling.stop_token_ids}
        if chat:
            further["chat_template_kwargs"] = self.chat_template_kwargs
        body |= {key: value for key, value in further.items() if value}
        path = "/chat/completions" if chat else "/completions"
        answer = self._ask(path, body)
        try:
            choice = answer["choices"][0]
            said = choice["message"].get("content") if chat else choice["text"]
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            zeros = np.zeros(tokens)
            return Response(zeros, zeros, said or "", choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InputError(f"--endpoint: {self.url}{path} gave no completion, but {str(answer)[:300]}") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for turn in range(1, TRIES + 1):
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    found = json.load(reply)
                    return found if isinstance(found, dict) else {}
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
                if error.code not in BUSY or turn == TRIES:
                    raise InputError(f"--endpoint: {self.url}{path} answered {said}") from None
            except (OSError, ValueError) as error:  # no connection, or no JSON
                if turn == TRIES or body is None:
                    raise InputError(
                        f"--endpoint: {self.url}{path} cannot be asked ({in_one_line(error)}). Is the server running?"
                    ) from None
            time.sleep(2.0**turn)
        raise AssertionError("the last try returns or raises")

    def update_weights(self, named_weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        raise InputError("An endpoint is for prerl evaluate: it cannot be given a policy's weights.")

    def forget(self) -> None:
        pass
