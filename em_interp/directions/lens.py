"""Which tokens a direction speaks for: the logit lens, by TransformerLens."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from em_interp.arguments import count
from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, ModelError
from em_interp.models.chat_model import ChatModel


def logit_lens(
    model: ChatModel, direction: Direction, *, layers: Sequence[int] | None = None, top_k: int = 10
) -> pd.DataFrame:
    """The tokens that a direction, and its opposite, promote when read through the final norm and unembedding.

    One row a layer, sign (+1: the direction, -1: its opposite) and rank from 0; columns layer, sign, rank, token_id,
    token, logit. The norm makes the reading independent of the direction's length, except where it adds a bias
    (`transformer_lens.tools.analysis.logit_readout`, on `model.bridge`).

    Raises DirectionError for another width or a layer that the direction lacks, ModelError where TransformerLens
    cannot read this architecture.
    """
    from transformer_lens.tools.analysis import logit_readout

    if direction.d_model != model.d_model:
        raise DirectionError(
            f"a direction of width {direction.d_model} cannot be read in {model.name}, whose d_model is "
            f"{model.d_model}. Use the model that it was made on ({direction.model})."
        )
    count("top_k", top_k, at_most=model.hf.config.get_text_config().vocab_size)
    chosen = direction if layers is None else direction.only(layers)
    rows = []
    for sign in (1, -1):
        try:
            read = logit_readout(model.bridge, sign * chosen.vectors, top_k=top_k)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"{model.name}: TransformerLens cannot read directions here ({error}).") from error
        for layer, ids, logits in zip(chosen.layers, read.top_ids.tolist(), read.values.tolist(), strict=True):
            for rank, (token, logit) in enumerate(zip(ids, logits, strict=True)):
                rows.append((layer, sign, rank, token, model.tokenizer.decode([token]), logit))
    return pd.DataFrame(rows, columns=["layer", "sign", "rank", "token_id", "token", "logit"])
