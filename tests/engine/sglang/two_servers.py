"""Two real SGLang servers behind sglang-router, one killed in the middle: python -m tests.engine.sglang.two_servers

Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.engine.sglang import real
from tests.engine.tiny import image, prompt, request
from vtengine.engine.sglang import connect_servers
from vtengine.engine.sglang.router import workers_of

PROMPTS, SIBLINGS = 12, 3


def asks(first, count, tokens):
    """`count` prompts from seed `first` on, SIBLINGS of each."""
    found = []
    for seed in range(first, first + count):
        picture = image(seed)
        ids = prompt(seed, 20, [picture])
        for k in range(SIBLINGS):
            sampling = {"temperature": 1.0, "seed": k, "max_new_tokens": tokens}
            found.append(request(f"{seed}-{k}", ids, [picture], **sampling))
    return found


@contextmanager
def router(urls):
    port = real.free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", *urls, "--policy", "manual"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(real.free_port())]
    health = ["--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--cb-failure-threshold", "1"]
    with open(os.devnull, "wb") as out:
        process = subprocess.Popen([*command, *options, *health], stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        real.wait(process, url, "/get_model_info")
        while len(workers_of(url, None, 10) or ()) < len(urls):
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def siblings_meet(backend):
    """Prompts of which all siblings but the first found all of the prompt in a cache."""
    together = 0
    for seed in range(100, 100 + PROMPTS):
        first, *others = asks(seed, 1, 2)
        await backend.generate(first)
        done = [await backend.generate(one) for one in others]
        together += all(completion.prefill_tokens <= 1 for completion in done)
    return together


async def one_is_killed(backend, victim):
    """All requests at once, SIGKILL for one server once some are running there."""
    tasks = [asyncio.create_task(backend.generate(one)) for one in asks(0, PROMPTS, 60)]
    while not backend.servers[0].stats()["running"]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    os.killpg(victim.pid, signal.SIGKILL)
    done = await asyncio.gather(*tasks)
    return Counter(completion.request_id for completion in done), Counter(len(one.token_ids) for one in done)


async def main():
    report: dict[str, object] = {}
    with ExitStack() as stack:
        folder = real.write_checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        servers = stack.enter_context(real.servers(folder, 2))
        urls = [url for url, _ in servers]
        report["router"] = real.has("sglang_router")
        address = stack.enter_context(router(urls)) if report["router"] else ",".join(urls)
        fleet = connect_servers(address, folder, deadline_s=240)
        await fleet.check()
        report["together"] = await siblings_meet(fleet)
        per_server = [server.stats()["requests"] for server in fleet.servers]
        victim = next(process for url, process in servers if url == fleet.servers[0].where)
        ids, lengths = await one_is_killed(fleet, victim)
        stats = fleet.stats()
        await fleet.close()
    report |= {"per_server": per_server, "answers": len(ids), "most": max(ids.values()), "lengths": lengths}
    report |= {"asked": PROMPTS * SIBLINGS, "down": stats["servers_down"], "failovers": stats["failovers"]}
    print(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main())
