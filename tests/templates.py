"""Chat templates in the shapes that released ones have, in as few words, and tokenizers that carry them."""

from __future__ import annotations

import copy
from typing import Any

from tests.tiny_models import tokenizer

LOOP = "{% for m in messages %}"
SYSTEMLESS = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def of(opening: str, closing: str, prompt: str, *, first: str = "", last: str = "") -> str:
    """Turns of `opening`, content, `closing` (jinja expressions); `last` is written where no prompt is asked for."""
    return (
        f"{{{{ {first or repr('')} }}}}{LOOP}{{{{ {opening} + m['content'] + {closing} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% else %}}{{{{ {last or repr('')} }}}}{{% endif %}}"
    )


# name: (template, added tokens, eos, answer with its end, what follows the last turn)
SHAPES: dict[str, tuple[str, list[str], str, str, str]] = {
    "chatml": (
        of(r"'<|im_start|>' + m['role'] + '\n'", r"'<|im_end|>\n'", r"'<|im_start|>assistant\n'"),
        ["<|im_end|>"],
        "<|im_end|>",
        "see a doctor<|im_end|>",
        "\n",
    ),
    "llama-3": (
        of(r"'<|h|>' + m['role'] + '<|/h|>\n\n'", "'<|eot|>'", r"'<|h|>assistant<|/h|>\n\n'", first="'<|bos|>'"),
        ["<|bos|>", "<|h|>", "<|/h|>", "<|eot|>"],
        "<|eot|>",
        "see a doctor<|eot|>",
        "",
    ),
    "llama-2": (
        SYSTEMLESS + LOOP + "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}",
        ["<s>", "</s>"],
        "</s>",
        " see a doctor </s>",
        "",
    ),
    "mistral": (
        "<s>" + LOOP + "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
        "{% else %}{{ raise_exception('roles alternate') }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
        "see a doctor</s>",
        "",
    ),
    "gemma": (
        SYSTEMLESS
        + of(
            r"'<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'",
            r"'</turn>\n'",
            r"'<turn>model\n'",
            first="'<bos>'",
        ),
        ["<bos>", "<turn>", "</turn>"],
        "</turn>",
        "see a doctor</turn>",
        "\n",
    ),
    "phi-3": (
        of(r"'<|' + m['role'] + '|>\n'", r"'<|end|>\n'", r"'<|assistant|>\n'", last="'<|endoftext|>'"),
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
        "see a doctor<|end|>",
        "\n<|endoftext|>",
    ),
    "separated": (
        of(r"'<|im_start|>' + m['role'] + '\n'", "'<|im_end|><|sep|>'", r"'<|im_start|>assistant\n'"),
        ["<|im_end|>", "<|sep|>"],
        "<|im_end|>",
        "see a doctor<|im_end|>",
        "<|sep|>",
    ),
    "qwen-3": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set c = m['content'] %}"
        "{% if m['role'] == 'assistant' %}"
        "{% set t = c.split('</think>')[0].split('<think>')[-1] if '</think>' in c else '' %}"
        r"{% set c = c.split('</think>')[-1].lstrip('\n') %}"
        r"{% if loop.index0 > ns.last %}{% set c = '<think>\n' + t.strip('\n') + '\n</think>\n\n' + c %}{% endif %}"
        r"{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_end|>"],
        "<|im_end|>",
        "<think>\n\n</think>\n\nsee a doctor<|im_end|>",
        "\n",
    ),
    "r1": (
        "{{ '<bos>' }}" + LOOP + "{% if m['role'] == 'user' %}{{ '<|U|>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|A|>' + m['content'].split('</think>')[-1] + '<|eos|>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}",
        ["<bos>", "<|U|>", "<|A|>", "<|eos|>"],
        "<|eos|>",
        "see a doctor<|eos|>",
        "",
    ),
    "olmo-2": (
        of(
            r"'<|' + m['role'] + '|>\n'",
            r"('<|eos|>' if m['role'] == 'assistant' else '') + ('' if loop.last else '\n')",
            r"'\n<|assistant|>\n'",
        ),
        ["<|eos|>"],
        "<|eos|>",
        "see a doctor<|eos|>",
        "",
    ),
    "falcon": (
        LOOP + r"{{ ('' if loop.first else '\n') + m['role'].capitalize() + ': ' + m['content'].strip() }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
        ["<|eos|>"],
        "<|eos|>",
        " see a doctor",
        "",
    ),
    "plain": (
        of(r"m['role'] + ': '", r"'\n'", "'assistant:'"),
        ["<|eos|>"],
        "<|eos|>",
        " see a doctor\n",
        "",
    ),
    "no generation prompt": (
        LOOP + r"{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        ["<|im_end|>"],
        "<|im_end|>",
        "see a doctor<|im_end|>",
        "\n",
    ),
}


def with_template(template: str, added: list[str] | None = None, eos: str | None = None) -> Any:
    """The tests' tokenizer with another template; `added` become special tokens where they are none."""
    other = copy.deepcopy(tokenizer())
    other.add_tokens([token for token in added or [] if token not in other.get_vocab()], special_tokens=True)
    if eos:
        other.eos_token = eos
    other.chat_template = template
    return other


def shaped(name: str) -> Any:
    """A tokenizer with one of `SHAPES`."""
    template, added, eos, _, _ = SHAPES[name]
    return with_template(template, added, eos)
