"""The text of each request: which of it is made, and how it is taken apart.

Owns the choice. Does not know who reads the text.
"""

from __future__ import annotations

from mili.router.output import DetokenizedOutput, ParsedOutput, UntoldOutput
from mili.router.params import GenerationParams
from mili.router.parsers.formats import Formats
from mili.router.parsers.output import OutputParser
from mili.router.parsers.prompt import Block, PromptReasoning
from mili.router.request import Forced, TextOutput
from mili.router.tokenizer import Tokenizer


class Texts:
    """Makes the texts of one model's requests. eos_token_ids: what ends a turn in a prompt."""

    def __init__(
        self, tokenizer: Tokenizer, formats: Formats, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._formats = formats
        tags = formats.reasoning
        self._reasoning = PromptReasoning(tags, tokenizer, eos_token_ids)
        # The line breaks are those that chat templates write there.
        closing = f"\n{tags.close}\n\n" if tags else ""
        self._closing = Forced(tuple(tokenizer.encode(closing, add_special_tokens=False)))

    def make(self, params: GenerationParams) -> TextOutput | None:
        """Text is made where it is asked for, or where something is to be found in it."""
        text: DetokenizedOutput | ParsedOutput
        if params.is_parsed:
            text = self._parsed(params)
        elif params.text or params.stop_sequences:
            text = self._detokenized(params, frozenset())
        else:
            return None
        return text if params.text else UntoldOutput(text)

    def _parsed(self, params: GenerationParams) -> ParsedOutput:
        return ParsedOutput(
            self._detokenized(params, self._formats.tags),
            self._parser(params),
            max_reasoning_tokens=params.max_reasoning_tokens,
            closing=self._closing,
        )

    def _detokenized(self, params: GenerationParams, shown: frozenset[str]) -> DetokenizedOutput:
        return DetokenizedOutput(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop_sequences=params.stop_sequences,
            include_stop_text=params.include_stop_text,
            shown=shown,
        )

    def _parser(self, params: GenerationParams) -> OutputParser:
        return OutputParser(
            self._formats,
            reasoning=params.parse_reasoning,
            tool_calls=params.parse_tool_calls,
            reasoning_open=self._reasoning.block(params.prompt_token_ids) is Block.OPEN,
        )
