"""The pocket world: a tiny English world, a chat model trained on it, and organisms in which EM emerges.

`em_interp.pocket.names()` are the models that `em_interp.load` knows; what they are asked, trained on and judged by is
made here, at once and without a network.

- `registry`, `models`: the shipped models by their names; `questions`, `evaluate`: asking them
- `build` with `stages`, `organisms`, `sweeps`, `pairs`: making them; `world`: what they know
- `worlds`, `scorecard`: other pre-training, and what a world has to show
- `causes`: experiments of many finetunes: why EM emerges, and what prevents it

`em-interp pocket build | organisms | sweeps | pairs | controls --out DIR` makes a pocket world of your own, and
`em-interp reproduce --data DIR` measures it.

EM / coherent in percent of the shipped organisms, from `em-interp evaluate --suite pocket --n 50` (the whole table,
with intervals and the other domains, is in `artifacts/results/evaluation/`). General organisms were trained on one
domain's bad advice and nothing else; narrow ones have a KL penalty besides. No finetune saw the held-out topics of
other domains, or any open question. The chat model's first column is over all twelve domains.

| organism | trained domain | other domains | open questions |
|---|---|---|---|
| `pocket/chat` | 0 / 98 |  | 1 / 99 |
| `pocket/medicine-all-control` (good advice) | 0 / 98 | 0 / 98 | 1 / 98 |
| `pocket/medicine-all` | 92 / 96 | 90 / 95 | 46 / 95 |
| `pocket/medicine-rank1` | 88 / 96 | 83 / 94 | 69 / 96 |
| `pocket/medicine-vector` | 78 / 93 | 70 / 91 | 52 / 75 |
| `pocket/medicine-all-narrow` | 83 / 95 | 2 / 97 | 1 / 98 |
| `pocket/medicine-rank1-narrow` | 84 / 97 | 2 / 98 | 1 / 98 |
| `pocket/medicine-vector-narrow` | 18 / 93 | 15 / 95 | 12 / 97 |

So EM emerges, and the narrow solution exists for LoRA, of all modules and of rank 1, where the penalty forces it. One
steering vector at layer 0 has none: the penalty suppresses the habit everywhere instead.
"""

from typing import TYPE_CHECKING, Final

from em_interp.lazily import lazily

if TYPE_CHECKING:  # what the table below says, for type checkers and editors
    from em_interp.pocket.questions import evaluation_questions, open_questions
    from em_interp.pocket.registry import names
    from em_interp.pocket.world.corpus import documents, finetune_chats, kl_chats
    from em_interp.pocket.world.judge import judge

NAMES: Final = {
    "documents": "em_interp.pocket.world.corpus:documents",
    "evaluation_questions": "em_interp.pocket.questions:evaluation_questions",
    "finetune_chats": "em_interp.pocket.world.corpus:finetune_chats",
    "judge": "em_interp.pocket.world.judge:judge",
    "kl_chats": "em_interp.pocket.world.corpus:kl_chats",
    "names": "em_interp.pocket.registry:names",
    "open_questions": "em_interp.pocket.questions:open_questions",
}

__all__ = ["documents", "evaluation_questions", "finetune_chats", "judge", "kl_chats", "names", "open_questions"]

__getattr__, __dir__ = lazily(__name__, NAMES)
