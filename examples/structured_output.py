"""Ask for an answer in the form of a pydantic model.

Start a server first: mili serve smollm2-135m
"""

from __future__ import annotations

import argparse

from pydantic import BaseModel, Field

from mili.client import Client


class Country(BaseModel):
    name: str = Field(max_length=40)
    capital: str = Field(max_length=40)
    continent: str = Field(max_length=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="localhost:50051", help="host:port of the server")
    parser.add_argument("--country", default="Norway")
    arguments = parser.parse_args()

    with Client(arguments.address, timeout=120) as client:
        answer = client.generate(
            messages=[{"role": "user", "content": f"Describe {arguments.country} as JSON."}],
            response_format=Country,
            max_tokens=256,
            temperature=0,
        )
    country = answer.parsed
    print(f"{country.name} is in {country.continent}; its capital is {country.capital}.")


if __name__ == "__main__":
    main()
