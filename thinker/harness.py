"""An adapter for lm-evaluation-harness: its tasks, computed by Thinker's own decoders.

    python -m thinker.harness --model thinker --model_args pretrained=runs/demo,dtype=int8 --tasks lambada_openai

is the harness's own command with the model `thinker` added. The published folder runs in its `hf` backend as well; that
one goes through transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401 - the harness fills its list of models only while that is empty: its own come first
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from .evaluate import token_losses
from .llm import load

T = TypeVar("T")


@register_model("thinker")
class ThinkerHarness(LM):
    """Any model that Thinker opens. Requests longer than the context lose their beginning; a warning counts them.

    What is to be written gets all the room that there is behind its context, and at least half of `ctx_len`.
    The harness gives every model a device and sizes of batches, on which nothing depends here; others are a
    `ValueError`.
    """

    def __init__(
        self,
        pretrained: str,
        backend: str = "auto",
        dtype: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such argument of a model: there are pretrained, backend, dtype")
        self.llm = load(pretrained, backend, dtype, slots=1)  # type: ignore[arg-type]
        self.cut = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context), and whether greedy decoding writes it."""
        return self._answered(self._continuation, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): its log-probability, every token once, with as much context as there is room for."""
        return [self._text(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): the continuation up to one of the strings in `until`."""
        return self._answered(self._continued, requests)

    def _answered(self, answer: Callable[..., T], requests: list[Instance]) -> list[T]:
        before = self.cut
        answers = [answer(*request.args) for request in requests]
        if cut := self.cut - before:
            limit = self.llm.config.ctx_len
            warnings.warn(f"{cut} of {len(requests)} requests lost their beginning to ctx_len {limit}", stacklevel=3)
        return answers

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        # A space at the border belongs to the continuation, since tokens carry the space in front of their word.
        stem = context.rstrip()
        continuation, context = context[len(stem) :] + continuation, stem
        whole = list(self.llm.encode(context + continuation))
        first = len(self.llm.encode(context)) if context else len(whole) - len(self.llm.tokenizer.encode(continuation))
        # A token may lie across the border, and counts then; without bos the first of all can't be predicted.
        first = max(min(first, len(whole) - 1), 1)
        over = len(whole) - 1 - self.llm.config.ctx_len
        if over > 0:
            self.cut += 1
            whole, first = whole[over:], max(first - over, 1)
        losses, likeliest = token_losses(self.llm.decoder, np.array(whole), first - 1)
        return -float(losses.sum()), bool(likeliest.all())

    def _text(self, text: str) -> float:
        if not text:
            return 0.0
        result = self.llm.evaluate([text])
        return -result.loss * result.tokens

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until", [])
        ids, ctx_len = self.llm.encode(context), self.llm.config.ctx_len
        wanted = min(int(settings.get("max_gen_toks", 256)), max(ctx_len - len(ids), ctx_len // 2))
        room = ctx_len - wanted
        if len(ids) > room:
            self.cut += 1
            kept = max(room - self.llm.files.add_bos, 1)  # bos comes in front again
            context = self.llm.tokenizer.decode(ids[len(ids) - kept :])
        temperature = float(settings.get("temperature", 0.0))
        return self.llm.generate(
            context,
            max_new_tokens=wanted,
            temperature=0.0 if settings.get("do_sample") is False else temperature,
            top_k=int(settings.get("top_k", 0)),
            top_p=float(settings.get("top_p", 1.0)),
            min_p=float(settings.get("min_p", 0.0)),
            stop=[until] if isinstance(until, str) else [text for text in until if text],
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
