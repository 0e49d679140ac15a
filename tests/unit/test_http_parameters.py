"""Every parameter that the official openai package can send is known, or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from openai.resources import Completions, Embeddings
from openai.resources.chat import Completions as ChatCompletions
from pydantic import ValidationError

from mili.client.http.bodies import Body, ChatBody, CompletionBody, EmbeddingsBody
from mili.client.http.errors import from_validation

# Of the package itself: not in the body.
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "a"}
EMBEDDINGS: dict[str, Any] = {"model": "m", "input": "a"}
CREATES = [
    (ChatCompletions.create, ChatBody, CHAT),
    (Completions.create, CompletionBody, COMPLETION),
    (Embeddings.create, EmbeddingsBody, EMBEDDINGS),
]
# What we know and do not serve. One that stands neither here nor in a body is new: decide on it.
REFUSED = {
    ChatBody: {
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    },
    CompletionBody: set[str](),
    EmbeddingsBody: set[str](),
}


def fields(body: type[Body]) -> set[str]:
    return set(body.model_fields)


@pytest.mark.parametrize(("create", "body", "least"), CREATES)
def test_every_parameter_is_known(create: object, body: type[Body], least: dict[str, Any]) -> None:
    parameters = set(inspect.signature(create).parameters) - TRANSPORT  # type: ignore[arg-type]
    assert least.keys() <= parameters
    assert parameters - fields(body) == REFUSED[body]


@pytest.mark.parametrize(
    ("body", "least", "name"),
    [(body, least, name) for _, body, least in CREATES for name in sorted(REFUSED[body])],
)
def test_the_others_are_refused_by_name(body: type[Body], least: dict[str, Any], name: str) -> None:
    body.model_validate(least)
    with pytest.raises(ValidationError) as problem:
        body.model_validate({**least, name: "low"})
    refusal = from_validation(problem.value)
    assert name in str(refusal)
