"""The server: an OpenAI-compatible API over a running batch of each model (`bytelm serve`, extra `serve`).

    client → server (uvicorn: sockets, signals) → guard (keys, limits) → app (routes) → schema (what was asked)
           → engine (a thread that steps the sessions) → queue (fair, bounded) → generate.session
           ← answers (text, exact bytes, logprobs; JSON or server-sent events)

Nothing below this package knows of HTTP.
"""
