"""Directions of the residual stream: extracted, kept, compared, read through the lens.

- `direction`: `Direction`, its arithmetic and its file; `extraction`: contrasts, and the kinds of directions
- `activations`, `store`: hooks that average or keep
- `reliability`, `resampling`: split halves, held-out separation and resamples
- `cosines`: of finetunes with each other, beside their nulls
- `lens`: what a direction says in words; `gguf`: control vectors for llama.cpp
- `rank1`: what rank-1 adapters read and write

**Sign**: misaligned minus aligned, so adding a direction induces misalignment.

**Kinds** of a direction from four cells (model by text): `data-diff` (the papers' mean-diff: both texts in the
finetune), `data-diff-in-chat` (both texts in the chat model: the content control), `model-diff` (misaligned texts in
both models), `both-diff`.

**Nulls** of a cosine are random directions, which take the residual for isotropic; activations are not, so two
directions of nothing but noise are more alike than that. Where the responses are at hand, `permutation_p` shuffles
which of them are misaligned, and is the one to trust. A released mean has no single responses, so its cosines have a
null and no interval.

    v + w, v - w, 2 * v, v.only([24]), v.at(24), v.project(activations, 24)

do what they say; directions of different widths, models or layers refuse to combine. Layers, model, hook point, token
scope and sources travel with a saved direction.
"""
