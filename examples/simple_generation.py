"""Ask a model twice: to continue a text, and to answer in a chat.

Start a server first: mili serve smollm2-135m
"""

from __future__ import annotations

import argparse

from mili.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="host:port of the server")
    address = parser.parse_args().address

    with Client(address, timeout=60) as client:
        story = client.generate("Once upon a time, a small robot", max_tokens=32, temperature=0)
        print(f"Text: Once upon a time, a small robot{story.text}")

        answer = client.generate(
            messages=[
                {"role": "system", "content": "You answer in one sentence."},
                {"role": "user", "content": "What is the capital of France?"},
            ],
            max_tokens=64,
            temperature=0,
        )
        print(f"Chat: {answer.text}")
        print(f"({answer.usage.completion_tokens} tokens, ended by {answer.finish_reason})")


if __name__ == "__main__":
    main()
