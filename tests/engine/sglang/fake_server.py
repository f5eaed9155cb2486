"""A local server that speaks SGLang's /generate, with a perfect prefix cache and faults on demand. No model in it."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from tests.engine.tiny import PAD, VOCAB

CONTROLS = (
    *("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_distributed"),
    *("init_weights_update_group", "destroy_weights_update_group", "begin_weight_update", "end_weight_update"),
    *("release_memory_occupation", "resume_memory_occupation"),
)
GROUP_CALLS = ("init_weights_update_group", "update_weights_from_distributed", "destroy_weights_update_group")
REPLY = tuple(b"abcdefghijklmnopqrstuvwxyz")


class FakeSglang:
    """`faults`: names, each used up by the request it strikes; a name in `always` strikes every one.

    dies: the connection ends before the first token · dies_later: after it · silent: never answers · queue_full ·
    refused · slow: 50 ms per token · garbage; always only: html · miscounts · wrong_ids · no_logprobs · sick: its
    health is 503 · frozen: like silent, and so is its health · dead: every connection is cut. The name of one of
    CONTROLS: that call says no. `calls`: what came on those, in order.
    seeded: replies are drawn from prompt and seed, one of its own for each. reads: `loaded` are the tensors of the last
    update from a folder.
    scheduler: a process of `scheduler.start` that takes part in broadcasts; the server dies with it.
    """

    def __init__(self, **info):
        self.info = {"version": "0.5.17", "incremental_streaming_output": False} | info
        self.model = {"model_path": "/models/tiny", "model_type": "qwen2_5_vl", "weight_version": "default"}
        self.vocab, self.image_token, self.token_s = VOCAB, PAD, 0.0
        self.seeded, self.reads, self.loaded = False, False, {}
        self.scheduler, self.asking = None, threading.Lock()
        self.workers = None  # a list makes it an sglang-router that is asked for them
        self.faults, self.always, self.flush_refusals, self.health_checks = [], set(), 0, 0
        self.requests, self.aborted, self.flushes, self.calls, self.headers = [], [], 0, [], []
        self.offers = {call for call in CONTROLS if not call.endswith("_weight_update")}  # as 0.5.17 does
        self.lock, self.prefixes, self.stop = threading.Lock(), [], threading.Event()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = _Quiet(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def strikes(self, fault):
        with self.lock:
            if fault in self.faults:
                self.faults.remove(fault)
                return True
        return fault in self.always

    def admit(self, keys):
        """Cached tokens of a prompt; it is in the cache from now on."""
        with self.lock:
            cached = max((_common(keys, known) for known in self.prefixes), default=0)
            self.prefixes.append(list(keys))
        return min(cached, len(keys) - 1)


def _common(a, b):
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeSglang

    def log_message(self, *_):
        pass

    def reply(self, body, status=200):
        data = json.dumps(body).encode() if not isinstance(body, bytes) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        fake = self.fake
        if "dead" in fake.always:
            return self.drop()
        if "html" in fake.always:
            return self.reply(b"<html>hello</html>")
        if self.path == "/health_generate":
            fake.health_checks += 1
            if "frozen" in fake.always:
                return self.fall_silent()
            if "sick" in fake.always:
                return self.reply({}, 503)
        pages = {"/model_info": fake.model, "/get_model_info": fake.model, "/server_info": fake.info}
        pages |= {"/health_generate": {}, "/health": {}}  # the latter as one that was told not to ask its scheduler
        pages |= {"/workers": {"workers": fake.workers}} if fake.workers is not None else {}
        return self.reply(pages[self.path]) if self.path in pages else self.reply({"detail": "Not Found"}, 404)

    def do_POST(self):
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        path = self.path.split("?")[0]
        if "dead" in fake.always:
            return self.drop()
        fake.headers.append(dict(self.headers))
        if path == "/generate":
            return self.generate(body)
        if path == "/v1/detokenize":
            return self.reply({"text": "<|image_pad|>" if body["tokens"] == [fake.image_token] else "x"})
        if path == "/abort_request":
            fake.aborted.append(body["rid"])
            return self.reply(b"")
        if path == "/flush_cache":
            with fake.asking:  # its scheduler does it, once it has done what it is at
                pass
            if fake.flush_refusals:
                fake.flush_refusals -= 1
                return self.reply(b"Flush cache failed.", 400)
            fake.flushes += 1
            fake.prefixes.clear()
            return self.reply(b"Cache flushed.")
        if path == "/update_weight_version":
            fake.model["weight_version"] = body["new_version"]
            return self.reply({"success": True})
        if fake.reads and path == "/update_weights_from_disk":
            fake.loaded = {k: v for part in Path(body["model_path"]).glob("*") for k, v in load_file(part).items()}
        if path[1:] in fake.offers:
            fake.calls.append((path[1:], body))
            if fake.strikes(path[1:]):
                return self.reply({"success": False, "message": "out of memory"}, 400)
            if fake.scheduler is not None and path[1:] in GROUP_CALLS:
                return self.scheduled(path[1:], body)
            return self.reply(None if "memory" in path else {"success": True, "message": "ok"})
        return self.reply({"detail": "Not Found"}, 404)

    def scheduled(self, call, body):
        """What the scheduler says; its death is the server's."""
        try:
            with self.fake.asking:
                self.fake.scheduler.send((call, body))
                ok, message, tensors = self.fake.scheduler.recv()
        except (EOFError, OSError):
            self.fake.always.add("dead")
            return self.drop()
        self.fake.loaded |= tensors
        return self.reply({"success": ok, "message": message}, 200 if ok else 400)

    def generate(self, body):
        fake, params = self.fake, body["sampling_params"]
        is_probe = "rid" not in body
        if not is_probe:
            fake.requests.append(body)
            if fake.strikes("silent") or "frozen" in fake.always:
                return self.fall_silent()
            if fake.strikes("queue_full"):
                return self.reply({"error": {"message": "The request queue is full."}}, 503)
            if fake.strikes("refused"):
                return self.reply({"error": {"message": "cannot load image"}}, 400)
            if fake.strikes("dies"):
                return self.drop()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if any(int(token_id) >= fake.vocab for token_id in params.get("logit_bias", {})):
            self.event({"error": {"message": "logit_bias must has keys in [0, 255]", "code": 400}})
        elif not is_probe:
            try:
                if not self.stream(body):
                    return self.drop()
            except OSError:
                return self.drop()
        self.piece(b"data: [DONE]\n\n")
        self.piece(b"")
        return None

    def stream(self, body):
        """False: the connection is to be cut."""
        fake, params = self.fake, body["sampling_params"]
        ids, keys = self.expand(body)
        output = list(REPLY) * 8
        if fake.seeded:
            output = random.Random(f"{ids} {params['sampling_seed']}").choices(range(32, 127), k=200)
        stops = params["stop_token_ids"]
        output = (
            [*output[:8], stops[0]] if stops and params["max_new_tokens"] > 8 else output[: params["max_new_tokens"]]
        )
        cached = min(fake.admit([*keys, *output]), len(ids) - 1)
        interval, later, slow = params["stream_interval"], fake.strikes("dies_later"), fake.strikes("slow")
        sent = 0
        for count in range(1, len(output) + 1):
            time.sleep(0.05 if slow else fake.token_s)
            last = count == len(output)
            if not (last or count == 1 or count % interval == 0):
                continue
            aborted = body["rid"] in fake.aborted
            meta = {"id": body["rid"], "prompt_tokens": len(ids), "cached_tokens": cached, "completion_tokens": count}
            meta |= {"weight_version": fake.model["weight_version"], "finish_reason": None}
            if last or aborted:
                kind = "abort" if aborted else "stop" if stops and output[-1] == stops[0] else "length"
                meta["finish_reason"] = {"type": kind}
            begin = sent if fake.info["incremental_streaming_output"] else 0
            meta["output_token_logprobs"] = [[-0.125, token, None] for token in output[begin:count]]
            chunk = {"text": "\u0085\u2028\x1c", "output_ids": output[begin:count], "meta_info": meta}
            if body["return_prompt_token_ids"]:
                chunk["prompt_token_ids"] = ids
            if "dead" in fake.always:
                return False
            self.event(self.spoiled(chunk))
            sent = count
            if later:
                return False
            if aborted:
                break
        return True

    def spoiled(self, chunk):
        fake, meta = self.fake, chunk["meta_info"]
        if "miscounts" in fake.always:
            meta["prompt_tokens"] += 3
        if "wrong_ids" in fake.always:
            chunk["prompt_token_ids"] = [*chunk["prompt_token_ids"][:-1], 77]
        if "no_logprobs" in fake.always:
            del meta["output_token_logprobs"]
        return chunk

    def expand(self, body):
        """Ids with every placeholder repeated, and the keys of the cache."""
        ids, keys, images = [], [], iter(body.get("image_data") or [])
        for token in body["input_ids"]:
            if token != self.fake.image_token:
                ids.append(token)
                keys.append(token)
                continue
            url = next(images)
            with Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) as image:
                count = (image.width // 28) * (image.height // 28)
                content = hash(image.tobytes())
            ids += [token] * count
            keys += [(content, k) for k in range(count)]
        return ids, keys

    def event(self, data):
        if self.fake.strikes("garbage"):
            self.piece(b"data: {not json\n\n")
        else:
            # as SGLang does: U+2028 and U+0085 stand in the text as they are, and end no line
            self.piece(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

    def piece(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def fall_silent(self):
        self.fake.stop.wait(20)
        return self.drop()

    def drop(self):
        self.close_connection = True
        self.connection.close()
