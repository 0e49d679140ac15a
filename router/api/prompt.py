"""Prompts to token ids, off the asyncio thread.

Owns the threads for text work and the tokenizer's and template's place in a call. Does not know
sampling, streams or the engine.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mili.router.api.chat import (
    check_continued,
    template_messages,
    template_tools,
    template_variables,
    texts_of,
)
from mili.router.chat_template import ChatTemplate
from mili.router.errors import Reason, RequestError
from mili.router.stop import StopMatcher
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb
from mili.v1.admin_pb2 import PinPrefixRequest
from mili.v1.embedding_pb2 import EmbedInput

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Memory and time grow with the text, so one that cannot fit is refused before it is read. A
# normalizer may shrink text: NFC to less than half. A whole context of tokens longer than 64
# bytes, runs of spaces, is no prompt.
_NORMALIZER_SLACK = 4
# Token ids that are copied in less time than a thread takes to wake.
_FEW_IDS = 2048
_MAX_BYTES_PER_TOKEN = 64
_MIN_TEXT_BYTES = 64 * 1024
_MIN_TRUNCATED_BYTES = 1024 * 1024


class TextThreads:
    """A few threads for text work, and a bound on the work that waits for them."""

    def __init__(self, max_pending: int) -> None:
        # One core is left to the event loop.
        threads = max(1, (os.cpu_count() or 1) - 1)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._free = threading.Semaphore(max_pending)

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return work(*args, **kwargs), computed in a thread.

        Work whose caller is gone counts until a thread has done it, or dropped it unbegun: till
        then it holds its memory.
        """
        if not self._free.acquire(blocking=False):
            raise RequestError(Reason.QUEUE_FULL, "too many prompts wait for the tokenizer")
        wanted = True

        def counted() -> _T:
            if not wanted:
                raise CancelledError
            return work(*args, **kwargs)

        future = self._executor.submit(counted)
        future.add_done_callback(lambda _: self._free.release())
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        finally:
            wanted = False
            # It holds an error whose traceback holds this frame, and the request.
            del future

    def close(self) -> None:
        """Forget the work that waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class PromptReader:
    """Reads the prompts of one model. Safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def is_quick(self, generation: pb.Generation) -> bool:
        """Whether `read` takes less time than the way to a thread and back."""
        ids = generation.token_ids.ids
        return 0 < len(ids) <= _FEW_IDS and not generation.stopping.stop_sequences

    def read(self, generation: pb.Generation, context_limit: int) -> list[int]:
        """Return the prompt's token ids, truncated where the caller asks for it.

        Prepares the stop sequences too, which the output then finds ready.
        """
        try:
            StopMatcher(tuple(generation.stopping.stop_sequences))
        except ValueError as error:
            field = "generation.stopping.stop_sequences"
            raise RequestError(Reason.INVALID_FIELD, str(error), field=field) from None
        max_bytes = self._max_bytes(context_limit)
        if generation.HasField("truncate_prompt_tokens"):
            max_bytes = max(max_bytes, _MIN_TRUNCATED_BYTES)
        special = True
        if generation.HasField("add_special_tokens"):
            special = generation.add_special_tokens
        ids = self._ids(generation, "generation.", max_bytes, special=special)
        kept = len(ids)
        if generation.HasField("truncate_prompt_tokens"):
            kept = min(kept, generation.truncate_prompt_tokens)
        return list(ids[len(ids) - kept :])

    def read_prefix(self, prefix: PinPrefixRequest, context_limit: int) -> list[int]:
        """Return the token ids that prompts of this prefix begin with."""
        return list(self._ids(prefix, "", self._max_bytes(context_limit), ask=False))

    def read_input(
        self, given: EmbedInput, path: str, context_limit: int, *, special: bool
    ) -> list[int]:
        """Return the token ids of an input that is not a prompt; special: with BOS and EOS."""
        if given.HasField("token_ids"):
            return list(given.token_ids.ids)
        check_bytes([given.text], f"{path}.text", self._max_bytes(context_limit))
        return self._tokenizer.encode(given.text, add_special_tokens=special)

    def render(
        self,
        chat: pb.ChatPrompt,
        path: str,
        max_bytes: int,
        *,
        ask: bool = True,
        too_long: Reason = Reason.CONTEXT_TOO_LONG,
    ) -> tuple[str, list[int]]:
        """Return a chat as the model's template writes it, and the text's token ids.

        ask: end with the opening of the answer. too_long: why it is refused beyond max_bytes.
        """
        template = self._template
        check_bytes(texts_of(chat), path, max_bytes, too_long)
        messages = template_messages(chat, path, template.call_form)
        tools = template_tools(chat, path, shown=template.shows_tools)
        if chat.continue_final_message:
            check_continued(chat, path)
        variables = template_variables(chat, path)
        try:
            text = template.render(
                messages,
                tools=tools,
                variables=variables,
                add_generation_prompt=ask and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
            )
            check_bytes([text], path, max_bytes, too_long)
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        except ValueError as error:
            raise RequestError(Reason.INVALID_FIELD, str(error), field=path) from None

    def _max_bytes(self, context_limit: int) -> int:
        per_token = _NORMALIZER_SLACK * self._tokenizer.longest_token_bytes
        return max(_MIN_TEXT_BYTES, context_limit * min(per_token, _MAX_BYTES_PER_TOKEN))

    def _ids(
        self,
        prompt: pb.Generation | PinPrefixRequest,
        path: str,
        max_bytes: int,
        *,
        special: bool = True,
        ask: bool = True,
    ) -> Sequence[int]:
        """path: of the message that holds the prompt, with a dot at its end, or empty."""
        if prompt.HasField("token_ids"):
            return prompt.token_ids.ids
        if prompt.HasField("chat"):
            return self.render(prompt.chat, f"{path}chat", max_bytes, ask=ask)[1]
        check_bytes([prompt.text], f"{path}text", max_bytes)
        return self._tokenizer.encode(prompt.text, add_special_tokens=special)


def check_bytes(
    texts: Iterable[str],
    field: str,
    max_bytes: int,
    reason: Reason = Reason.CONTEXT_TOO_LONG,
) -> None:
    """Raise RequestError for texts that have more bytes together, as UTF-8."""
    count = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    if count > max_bytes:
        message = f"the text has {count} bytes, and at most {max_bytes} are taken"
        raise RequestError(reason, message, field=field)
