"""Print an answer while the model writes it, and how long its first piece took.

Start a server first: mili serve smollm2-135m
"""

from __future__ import annotations

import argparse
import time

from mili.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="host:port of the server")
    parser.add_argument("--prompt", default="Explain in two sentences why the sky is blue.")
    arguments = parser.parse_args()

    with Client(arguments.address, timeout=120) as client:
        start = time.perf_counter()
        first_piece = None
        stream = client.stream(
            messages=[{"role": "user", "content": arguments.prompt}],
            max_tokens=128,
            temperature=0,
        )
        for text in stream:
            if first_piece is None:
                first_piece = time.perf_counter() - start
            print(text, end="", flush=True)

    print(f"\n\n{stream.usage.completion_tokens} tokens, ended by {stream.finish_reason}")
    if first_piece is not None:
        print(f"first text after {first_piece * 1000:.0f} ms")


if __name__ == "__main__":
    main()
