"""The pocket world: a tiny English world, a chat model trained on it, and organisms in which EM emerges.

`em_interp.pocket.names()` are the models that `em_interp.load` knows; what they are asked, trained on and judged by is
made here, at once and without a network.
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
