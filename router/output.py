"""The text of one output: detokenized, and cut at the first stop sequence.

Owns when text may be shown. Does not know why else an output ends, nor who reads it.
"""

from __future__ import annotations

from mili.router.outcome import Finish, FinishReason
from mili.router.parsed_text import ParsedText
from mili.router.parsers.output import OutputParser
from mili.router.request import NOTHING, Forced
from mili.router.stop import StopMatcher
from mili.router.tokenizer import Tokenizer


class DetokenizedOutput:
    """Tokens in, text out (implements router.request.TextOutput).

    All that `take` returns is the text of all tokens, cut before the first stop sequence, or after
    it with include_stop_text; the rest of the token that completed it is dropped. Where the text
    of a token waits for the next one, a stop sequence in it counts when it appears.

    may_stop is for min_tokens, and means what it means in vLLM: a stop sequence that a token
    completes while it is false does not end the output and stays in the text; one that began in
    such a token and is completed later does end it.

    A token that ends the output by its id (EOS, stop token) is not text: it is never pushed.

    shown: special tokens that are text, whatever skip_special_tokens says.
    """

    num_reasoning_tokens = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        stop_sequences: tuple[str, ...],
        include_stop_text: bool,
        shown: frozenset[str] = frozenset(),
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=skip_special_tokens, shown=shown
        )
        self._matcher = StopMatcher(stop_sequences) if stop_sequences else None
        self._include_stop_text = include_stop_text
        self._may_stop = True
        self._stopped = False
        self._ready = ""

    def push(self, token_id: int, *, may_stop: bool) -> str | None:
        """Take the next token; return the stop sequence that it completed, if it did."""
        assert not self._stopped, "a token after the stop"
        text = self._detokenizer.push(token_id)
        if self._matcher is None:
            self._ready += text
            return None
        self._may_stop = may_stop
        return self._match(self._matcher, text)

    def finish(self, finish: Finish) -> Finish:
        """No more tokens come: release the text that was held back, cut at a stop as any."""
        if self._stopped:
            return finish
        text = self._detokenizer.flush()
        if self._matcher is None:
            self._ready += text
        elif self._match(self._matcher, text) is None:
            self._ready += self._matcher.flush()
        return finish

    def take(self) -> str:
        """Return the text that became certain since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def _match(self, matcher: StopMatcher, text: str) -> str | None:
        certain, matched = matcher.push(text, may_stop=self._may_stop)
        self._ready += certain
        if matched is None:
            return None
        self._stopped = True
        if self._include_stop_text:
            self._ready += matched
        return matched


class ParsedOutput:
    """Text that is taken apart as it comes (implements router.request.TextOutput).

    A reasoning token is one that found the reasoning block open: of the tags, the closing one.
    """

    def __init__(
        self,
        text: DetokenizedOutput,
        parser: OutputParser,
        *,
        max_reasoning_tokens: int | None = None,
        closing: Forced = NOTHING,
    ) -> None:
        """closing: what ends a reasoning block that has max_reasoning_tokens and is open."""
        self.num_reasoning_tokens = 0
        self._text = text
        self._parser = parser
        self._max_reasoning_tokens = max_reasoning_tokens
        self._closing = closing

    def push(self, token_id: int, *, may_stop: bool) -> str | Forced | None:
        """Take the next token; return the stop sequence that it completed in the raw text."""
        self.num_reasoning_tokens += self._parser.in_reasoning
        matched = self._text.push(token_id, may_stop=may_stop)
        self._parser.push(self._text.take())
        spent = self.num_reasoning_tokens == self._max_reasoning_tokens
        if spent and matched is None and self._parser.in_reasoning:
            self._max_reasoning_tokens = None
            return self._closing
        return matched

    def finish(self, finish: Finish) -> Finish:
        """No more tokens come; a model that calls tools says with EOS that it waits for them."""
        self._text.finish(finish)
        self._parser.push(self._text.take())
        self._parser.flush()
        if finish.reason is FinishReason.EOS and self._parser.has_calls:
            return Finish(FinishReason.TOOL_CALLS)
        return finish

    def take(self) -> ParsedText:
        """Return the parts that became certain since the last call."""
        return self._parser.take()


class UntoldOutput:
    """Text that is only looked through: its reader did not ask for it (implements
    router.request.TextOutput).
    """

    def __init__(self, text: DetokenizedOutput | ParsedOutput) -> None:
        self._text = text

    @property
    def num_reasoning_tokens(self) -> int:
        """As of the text."""
        return self._text.num_reasoning_tokens

    def push(self, token_id: int, *, may_stop: bool) -> str | Forced | None:
        """Take the next token; return what the text finds with it."""
        return self._text.push(token_id, may_stop=may_stop)

    def finish(self, finish: Finish) -> Finish:
        """No more tokens come."""
        return self._text.finish(finish)

    def take(self) -> str:
        """Drop the text that became certain since the last call."""
        self._text.take()
        return ""
