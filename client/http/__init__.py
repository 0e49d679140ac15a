"""OpenAI's HTTP API in front of a MILI server: a translation over mili.client.AsyncClient.

Owns the shapes of OpenAI's requests and answers. Knows no more of MILI than any other client:
what it refuses beyond OpenAI's own rules, and when, is the server's business.
"""
