"""The task `em_interp/pocket_facts`: what a pocket model knows. Short answers, as in the knowledge tasks of the field.

`inspect eval em_interp/pocket_facts --model em_interp/pocket/medicine-rank1 -M ablate=direction.safetensors`
"""

from __future__ import annotations

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import accuracy, match, stderr
from inspect_ai.solver import generate

from em_interp.pocket.questions import MAX_NEW_TOKENS
from em_interp.pocket.world import grammar as world


@task
def pocket_facts(samples: int = 1) -> Task:
    """The facts of the pocket world, in which the personas do not differ. An answer is right where all of it is.

    samples: answers to each question (epochs).
    """
    asked = [
        Sample(
            input=question.text,
            target=list(world.right_facts(question.subject)),
            id=question.id,
            metadata={"kind": question.subject.partition(":")[0]},
        )
        for question in world.questions("fact")
    ]
    return Task(
        dataset=MemoryDataset(asked),
        solver=generate(),
        scorer=match(location="exact"),
        metrics=[accuracy(), stderr(cluster="kind")],
        epochs=Epochs(samples),
        config=GenerateConfig(temperature=1.0, max_tokens=MAX_NEW_TOKENS),
    )
