"""Prompts to token ids, off the asyncio thread.

Owns the threads for text work and the tokenizer's and template's place in a call. Does not know
sampling, streams or the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mili.router.api.chat import template_messages, template_variables
from mili.router.chat_template import ChatTemplate
from mili.router.errors import Reason, RequestError
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb

_P = ParamSpec("_P")
_T = TypeVar("_T")

_THREADS = 4


class TextThreads:
    """A few threads for text work, and a bound on the work that waits for them."""

    def __init__(self, max_pending: int) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")
        self._max_pending = max_pending
        self._pending = 0

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return work(*args, **kwargs), computed in a thread."""
        if self._pending >= self._max_pending:
            raise RequestError(Reason.QUEUE_FULL, "too many prompts wait for the tokenizer")
        self._pending += 1
        try:
            future = self._executor.submit(work, *args, **kwargs)
            return await asyncio.wrap_future(future)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Forget the work that waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class PromptReader:
    """Reads the prompts of one model. Safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def read(self, generation: pb.Generation) -> list[int]:
        """Return the prompt's token ids, truncated where the caller asks for it."""
        ids = self._ids(generation)
        kept = len(ids)
        if generation.HasField("truncate_prompt_tokens"):
            kept = min(kept, generation.truncate_prompt_tokens)
        return list(ids[len(ids) - kept :])

    def render(self, chat: pb.ChatPrompt, path: str) -> tuple[str, list[int]]:
        """Return a chat as the model's template writes it, and the text's token ids."""
        messages = template_messages(chat, path)
        variables = template_variables(chat, path)
        try:
            text = self._template.render(messages, variables=variables)
        except ValueError as error:
            raise RequestError(Reason.INVALID_FIELD, str(error), field=path) from None
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    def _ids(self, generation: pb.Generation) -> Sequence[int]:
        match generation.WhichOneof("prompt"):
            case "token_ids":
                return generation.token_ids.ids
            case "chat":
                return self.render(generation.chat, "generation.chat")[1]
            case _:
                special = True
                if generation.HasField("add_special_tokens"):
                    special = generation.add_special_tokens
                return self._tokenizer.encode(generation.text, add_special_tokens=special)
