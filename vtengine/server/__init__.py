"""An OpenAI-compatible server over any backend: adaptive resolution happens inside, in the one episode loop.

Needs the extra `serve`. `create_app(house)` is the application, `serve` runs it until a signal.
"""
