"""Use OpenAI's Python package (pip install openai) with MILI.

Start a server first: mili serve smollm2-135m --http-port 8000
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000/v1", help="of the HTTP API")
    parser.add_argument("--token", default="none", help="a tenant's, where the server wants one")
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.url, api_key=arguments.token)
    (model, *_) = client.models.list()
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_completion_tokens=64,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
