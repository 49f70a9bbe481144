"""Which combinations are cells, and running them by bench."""

from __future__ import annotations

from dataclasses import dataclass

from tests.matrix import adapters
from tests.matrix.families import FAMILIES
from tests.matrix.findings import FINDINGS
from tests.matrix.operations import Way
from tests.matrix.templates import TEMPLATES

# What is left out, and why. Losses, influence, gradients, sampling, training and saving never go through the bridge,
# and pad as they choose themselves: one way each. A cache matters while generating only.
# Dtypes and training meet the families of DTYPES and FEATURED; of mixtures of experts a router's choice would flip
# within bfloat16's rounding.
# An adapter's features meet every operation in the families of FEATURED, one for each way of naming and shaping its
# modules; the other families meet the plain ones.
FEATURED = ("qwen2", "phi3", "gpt2")
PLAIN = ("none", "lora", "vector")
BEYOND = ("gpt2", "opt", "gpt_neo", "gptj", "llama", "qwen2", "bloom", "mpt")
"""Families asked to read more than the 64 positions that they were made for: learned, fixed and rotary ones."""
DTYPES = ("gemma2", "olmo2", "gpt_neox", "mistral")
"""Families in every dtype, and trained, besides FEATURED: with norms after their writes, and with none of them."""
LENGTH_DEPENDENT = ("phi3-longrope", "llama-dynamic")

RIGHT, LEFT, BRIDGE = Way(), Way(side="left"), Way("bridge", "left")
CACHED = Way(side="left", cache="cache")


@dataclass(frozen=True)
class Cell:
    """family/feature/through/operation/side/dtype/cache, and the texts or scope where not the usual ones."""

    family: str
    feature: str
    operation: str
    way: Way = RIGHT
    dtype: str = "f32"
    texts: str = "short"
    template: str | None = None

    @property
    def id(self) -> str:
        """Its name on the page and the command line."""
        if self.family == "finding":
            return f"finding/{self.feature}"
        way = self.way
        parts = [self.family, self.feature, way.through, self.operation, way.side, self.dtype, way.cache]
        parts += [x for x in (way.variant, self.texts if self.texts != "short" else "", self.template) if x]
        return "/".join(parts)

    @property
    def bench(self) -> tuple[str, str, str, str, str]:
        """What it shares with others."""
        return self.family, self.feature, self.dtype, self.texts, self.template or ""


SOLUTIONS = ("losses", "influence", "gradients")


def _every(*operations: str, way: Way = LEFT, dtype: str = "f32") -> list[tuple[str, Way, str]]:
    return [(operation, way, dtype) for operation in operations]


_BARE = [
    *_every("load", "extract", "steer", "ablate"),
    *_every("load", "extract", way=RIGHT),
    *_every("load", "extract", "steer", "ablate", way=BRIDGE),
    *_every("load", way=Way("bridge")),
    *_every("steer", "ablate", way=Way(side="left", variant="prompt")),
    *_every("steer", "ablate", way=Way(side="left", cache="cache", variant="response")),
    *_every("steer", "ablate", "sample", way=CACHED),
    *_every("sample", way=Way(side="left", cache="cache", variant="greedy")),
    *_every("weights", "nll", "logprobs", "save", way=RIGHT),
    *_every("train", way=Way(variant="kl"), dtype="f64"),
    *_every("load", "extract", "steer", "nll", dtype="bf16"),
]
_LORA = [
    *_every("load", "base", "extract", "steer"),
    *_every("load", "base", "extract", "ablate", way=BRIDGE),
    *_every("sample", way=CACHED),
    *_every("weights", "nll", "logprobs", *SOLUTIONS, "save", way=RIGHT),
    *_every("train", way=Way(variant="kl"), dtype="f64"),
    *_every("gradients", "weights", way=RIGHT, dtype="f64"),
    *_every("load", "losses", dtype="bf16"),
]
_VECTOR = [
    *_every("load", "base"),
    *_every("load", "extract", way=BRIDGE),
    *_every("weights", *SOLUTIONS, "save", way=RIGHT),
    *_every("train", way=RIGHT, dtype="f64"),
]
_FEATURE = [
    *_every("load", "base", "extract", "ablate"),
    *_every("load", "steer", way=BRIDGE),
    *_every("sample", way=CACHED),
    *_every("weights", "nll", *SOLUTIONS, "save", way=RIGHT),
]


def cells() -> list[Cell]:
    """The whole matrix, in the order of its benches."""
    found: list[Cell] = []
    for family in FAMILIES:
        for feature in adapters.ALL if family in FEATURED else PLAIN:
            ways = {"none": _BARE, "lora": _LORA, "vector": _VECTOR}.get(feature, _FEATURE)
            for operation, way, dtype in ways:
                if feature == "two-active" and operation in (*SOLUTIONS, "save"):  # no folder to read
                    continue
                if dtype == "f32" or family in (*FEATURED, *DTYPES):
                    found.append(Cell(family, feature, operation, way, dtype))
            if feature in adapters.MEANT and feature != "lora":
                found.append(Cell(family, feature, "train", RIGHT, "f64"))
    for feature in PLAIN:  # padded, transformers gives this one NaN in float64
        found += [Cell("gemma2", feature, "train", Way(variant=v), "f32") for v in ("", "kl")]
    for family in (*BEYOND, *LENGTH_DEPENDENT):
        for operation in ("extract", "nll", "logprobs", *SOLUTIONS, "sample", "train"):
            found.append(Cell(family, "vector", operation, RIGHT, "f64" if operation == "train" else "f32", "long"))
    for kind in TEMPLATES:  # one family, every template; the families' own stand above
        ways = [*_every("extract", "nll", "logprobs", way=RIGHT), *_every("sample", "steer", way=CACHED)]
        ways += [("steer", Way(side="left", cache="cache", variant="response"), "f32")]
        ways += _every("train", way=RIGHT, dtype="f64")
        found += [Cell("mistral", "none", o, w, d, template=kind) for o, w, d in ways]
        found += [Cell("mistral", "vector", o, RIGHT, template=kind) for o in ("losses", "gradients")]
    found += [Cell("finding", name, name.partition("/")[0]) for name in FINDINGS]
    return sorted(found, key=lambda cell: cell.bench)
