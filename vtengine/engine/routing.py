"""What decides where a request goes: the beginning that siblings of a prompt and the turns of an episode share."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtengine.engine.base import Request


def routing_key(request: Request, image_token_id: int) -> str:
    """Of the prompt up to the end of its first image, and of that image's contents; of the whole prompt without one.

    Turn 2 begins with turn 1, so it has the same key.
    """
    ids = request.token_ids
    digest = hashlib.sha256()
    if request.images and image_token_id in ids:
        image = request.images[0]
        ids = ids[: ids.index(image_token_id) + image.visual_tokens]
        digest.update(image.content_hash.encode())
    digest.update(str(ids).encode())
    return digest.hexdigest()[:32]
