"""Run many prompts at once, a bounded number at a time, and print the answers in order.

Start a server first: mili serve smollm2-135m
"""

from __future__ import annotations

import argparse
import asyncio
import time

from mili.client import AsyncClient, Generation

COUNTRIES = ("France", "Japan", "Brazil", "Egypt", "Canada", "India", "Norway", "Kenya")


async def ask_all(client: AsyncClient, questions: list[str], at_once: int) -> list[Generation]:
    room = asyncio.Semaphore(at_once)

    async def ask(question: str) -> Generation:
        async with room:
            return await client.generate(
                messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
            )

    return await asyncio.gather(*map(ask, questions))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="host:port of the server")
    parser.add_argument("--at-once", type=int, default=4, help="requests in flight at most")
    arguments = parser.parse_args()

    questions = [f"Name one thing that {country} is known for." for country in COUNTRIES]
    async with AsyncClient(arguments.address, timeout=120) as client:
        start = time.perf_counter()
        answers = await ask_all(client, questions, arguments.at_once)
        seconds = time.perf_counter() - start

    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n  {answer.text}")
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    asyncio.run(main())
