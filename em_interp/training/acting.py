"""What acts on the residual stream while a model is trained, and no longer when it answers.

Adding a direction (preventative steering: Persona Vectors, arXiv 2507.21509) relieves training of adding it; projecting
one out (concept ablation finetuning: arXiv 2507.16795) leaves training no gradient along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from em_interp.errors import TrainingError
from em_interp.interventions.intervening import Add, Edit, Intervention, fingerprint_of, intervening
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import check_layer


@dataclass(frozen=True, eq=False)
class _Planned:
    """An intervention whose edits of one model are made."""

    made: Mapping[int, Edit]

    def edits(self, model: ChatModel) -> Mapping[int, Edit]:
        """As made: in training, `model` is under an adapter."""
        del model
        return self.made


class Acting:
    """Interventions in the passes over training conversations: `told` in words, `acts` as hashes, `planned` to be done.

    first_layer: the first whose output they change, None where there are none.

    Raises what `intervening` raises for those that do not fit the model, and TrainingError for one coefficient a batch
    row: the rows of training batches are drawn.
    """

    def __init__(self, model: ChatModel, interventions: Sequence[Intervention]) -> None:
        self.model, self.told = model, [repr(intervention) for intervention in interventions]
        self.planned = [_Planned(intervention.edits(model)) for intervention in interventions]
        layers = [check_layer(layer, model.n_layers) for one in self.planned for layer in one.made]
        for told, one in zip(self.told, self.planned, strict=True):
            if any(isinstance(edit, Add) and edit.theta.ndim > 1 for edit in one.made.values()):
                raise TrainingError(
                    f"{told} in training: rows are drawn there, so none has a coefficient of its own. Give one number."
                )
        self.first_layer = min(layers, default=None)
        self.acts = [fingerprint_of(one.made) for one in self.planned]

    def on(self, response: Bool[Tensor, "batch token"]) -> AbstractContextManager[None]:
        """Inside, they act. response: true at the response tokens of the batch (`Batch.answer_mask`)."""
        if not self.planned:
            return nullcontext()
        return intervening(self.model, self.planned, response_mask=response)

    def settings(self) -> dict[str, Any]:
        """What `training_spec.json` tells of them: what each does, and a hash of it."""
        both = zip(self.told, self.acts, strict=True)
        return {"interventions": [{"what": what, "acts": acts} for what, acts in both]} if self.told else {}
