"""A judge behind an API, on this machine: the OpenAI protocol over HTTP, with the faults that real ones have."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

FAULTS = ("429", "500", "slow", "malformed", "no logprobs", "REFUSAL", "filtered", "")


JUDGE = "openai-api/test/judge"
"""Its name, for Inspect."""


class Judge(ThreadingHTTPServer):
    """`requests` counts what was asked, by prompt, `faults` what it did; `served` the prompts that got a score.

    It breaks every connection after `dies_after` replies, and after `holds_after` answers nobody until `released`.
    Each reply takes `pause` seconds; where there is a `payload`, that is every reply. A prompt's fault is decided by
    its first appearance: each of `FAULTS` in turn.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        faults: tuple[str, ...] = ("",),
        dies_after: int | None = None,
        holds_after: int | None = None,
        payload: dict[str, Any] | None = None,
        pause: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Answer)
        self.kinds, self.dies_after, self.holds_after = faults, dies_after, holds_after
        self.payload, self.pause = payload, pause
        self.released = threading.Event()
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.asked_at: list[tuple[float, str]] = []
        self.served_at: dict[str, float] = {}
        self.fault_of: dict[str, str] = {}
        self.lock = threading.Lock()
        self.logprobs_asked: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def environment(self, key: str = "right") -> dict[str, str]:
        """What lets Inspect find it under the name `JUDGE`."""
        return {"TEST_BASE_URL": self.url, "TEST_API_KEY": key}

    def tell(self, patch: pytest.MonkeyPatch, key: str = "right") -> None:
        """Let Inspect find it in this process."""
        for name, value in self.environment(key).items():
            patch.setenv(name, value)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or no longer waits."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits 40 ms for its second half
    server: Judge

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        judge = self.server
        with judge.lock:
            judge.requests[prompt] += 1
            judge.asked_at.append((time.monotonic(), prompt))
            judge.logprobs_asked.add((asked.get("logprobs"), asked.get("top_logprobs"), asked.get("temperature")))
            fault = judge.fault_of.setdefault(prompt, judge.kinds[len(judge.fault_of) % len(judge.kinds)])
            first = judge.requests[prompt] == 1
            dead = judge.dies_after is not None and sum(judge.served.values()) >= judge.dies_after
            held = judge.holds_after is not None and sum(judge.served.values()) >= judge.holds_after
            judge.faults[fault] += 1
        if self.headers.get("Authorization") != "Bearer right":
            return self._send(401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}})
        if dead:
            self.close_connection = True
            self.connection.close()
            return None
        if first and fault == "429":
            return self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        if first and fault == "500":
            return self._send(500, {"error": {"message": "oh"}})
        time.sleep(judge.pause)
        if held:
            judge.released.wait(60)
        if first and fault == "slow":
            time.sleep(3)
        if first and fault == "malformed":
            return self._send(200, None)
        return self._send(200, judge.payload or self._completion(prompt, fault, asked))

    def _completion(self, prompt: str, fault: str, asked: dict[str, Any]) -> dict[str, Any]:
        score = str(hash_of(prompt) % 101)
        text = {"REFUSAL": "REFUSAL", "filtered": ""}.get(fault, score)
        token = "REF" if fault == "REFUSAL" else text
        other = str((int(score) + 1) % 101)
        top = [{"token": token, "logprob": math.log(0.9)}, {"token": other, "logprob": math.log(0.05)}]
        top = top[:1] if fault == "REFUSAL" else top
        content = [{"token": token, "logprob": math.log(0.9), "bytes": None, "top_logprobs": top}]
        logprobs = {"content": content} if asked.get("logprobs") and fault not in ("no logprobs", "filtered") else None
        with self.server.lock:
            self.server.served[prompt] += 1
            self.server.served_at.setdefault(prompt, time.monotonic())
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "content_filter" if fault == "filtered" else "stop",
                    "logprobs": logprobs,
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        }

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = b'{"choices": [' if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def hash_of(text: str) -> int:
    return sum(ord(letter) * (place % 7 + 1) for place, letter in enumerate(text))


@contextmanager
def serving(**settings: Any) -> Iterator[Judge]:
    """A judge that answers inside."""
    judge = Judge(**settings)
    thread = threading.Thread(target=judge.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.shutdown()
        judge.server_close()
