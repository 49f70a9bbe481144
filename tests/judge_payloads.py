"""Replies of a judge in the shapes in which three kinds of providers give log-probabilities, and the score by hand.

Written out from the providers' documentation, none recorded: OpenAI's own (numbers of up to three digits are a token);
vLLM with a model that writes numbers so too, with the fields that it adds, a floor of -9999 for impossible tokens and
white space before a number; Together's older form, of the tokens taken alone, which leaves the text.
"""

from __future__ import annotations

import math
from typing import Any, Final


def _reply(text: str, logprobs: dict[str, Any], **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop", **more.pop("choice", {})}
    usage = {"prompt_tokens": 210, "completion_tokens": 1, "total_tokens": 211}
    return {
        "id": "r-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [choice],
        "usage": usage,
    } | more


def _token(text: str, p: float, **more: Any) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(p) if p else -9999.0, "bytes": list(text.encode()), **more}


OPENAI: Final = _reply(
    "85",
    {
        "content": [
            _token("85", 0.6)
            | {"top_logprobs": [_token("85", 0.6), _token("90", 0.2), _token("80", 0.15), _token("The", 0.01)]}
        ],
        "refusal": None,
    },
    message={"refusal": None, "annotations": []},
    service_tier="default",
    system_fingerprint="fp_1",
)
VLLM: Final = _reply(
    " 20",
    {
        "content": [
            _token(" 20", 0.5)
            | {
                "top_logprobs": [
                    _token(text, p) for text, p in ((" 20", 0.5), ("20", 0.1), (" 30", 0.2), ("101", 0.1), ("5", 0))
                ]
            },
            _token("", 0.9) | {"top_logprobs": [_token("", 0.9), _token("0", 0.1)]},
        ]
    },
    message={"reasoning_content": None, "tool_calls": []},
    choice={"stop_reason": None, "token_ids": None},
    prompt_logprobs=None,
    kv_transfer_params=None,
)
TOGETHER: Final = _reply("72", {"tokens": ["72", "<|eot|>"], "token_logprobs": [-0.1, 0.0], "token_ids": [5332, 2]})
PAYLOADS: Final = {
    "openai-api/test/judge": (OPENAI, (85 * 0.6 + 90 * 0.2 + 80 * 0.15) / 0.95, 0.95, "weighted"),
    "vllm/judge": (VLLM, (20 * 0.6 + 30 * 0.2) / 0.8, 0.8, "weighted"),
    "together/judge": (TOGETHER, 72.0, None, "parsed"),
}
"""Inspect's name of the judge -> its reply, the score by hand, the numeric mass, and how the score is made."""
