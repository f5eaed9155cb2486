"""sglang-router: who its workers are.

Requests go to the workers themselves. The router (0.3.2, seen) writes each request anew with the fields that it knows:
logit_bias is not among them, so markers could be sampled, nor is the wish for the prompt's ids that we compare. It does
not abort requests, and weights cannot be updated through it.
"""

from __future__ import annotations

from vtengine.engine.sglang.transport import ADDRESS


def workers_of(url: str, api_key: str | None, connect_s: float) -> list[str] | None:
    """Addresses of the router's healthy workers; None where no router answers. Raises ValueError for no usable one."""
    try:
        import httpx
    except ImportError:
        return None  # whoever connects next says what to install
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/workers", headers=headers, timeout=connect_s, trust_env=False)
        listed = response.json()["workers"] if response.status_code == 200 else None
        found = [(str(worker["url"]).rstrip("/"), bool(worker.get("is_healthy", True))) for worker in listed or ()]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    if listed is None:
        return None
    usable = [address for address, healthy in found if healthy and address.startswith(ADDRESS)]
    if not usable:
        raise ValueError(
            f"backend {url}: is an sglang-router without a healthy worker that speaks HTTP ({len(found)} listed); "
            "start it with --worker-urls http://..."
        )
    return usable
