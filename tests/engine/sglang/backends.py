"""Backends over the fake server."""

from __future__ import annotations

from tests.engine.sglang.fake_server import FakeSglang
from tests.engine.tiny import PAD, VIDEO, VOCAB, tiny_config
from vtengine.engine.sglang import ServedModel, SglangHttpBackend

TINY = ServedModel("tiny", VOCAB, PAD, VIDEO, min_pixels=784, config=tiny_config())


class OverFake(SglangHttpBackend):
    """Closes its server with itself."""

    fake: FakeSglang

    async def close(self):
        await super().close()
        self.fake.close()


def over_fake_server(fake=None, **options):
    fake = fake or FakeSglang()
    backend = OverFake(fake.url, options.pop("model", TINY), **options)
    backend.fake = fake
    return backend
