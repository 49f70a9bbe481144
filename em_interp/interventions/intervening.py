"""Changing the residual stream while a model runs: `with intervening(model, [Steer(...), Ablate(...)]):`.

Interventions act on block outputs (layer l is the output of block l), in the order given, in every forward pass: plain,
or within `generate` with or without KV cache, through `.hf` and `.bridge` alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Final, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, HookError, UsageError
from em_interp.evaluation.sampling import sample
from em_interp.files import given
from em_interp.files.given import Source
from em_interp.files.manifest import fingerprint
from em_interp.files.tables import Parts
from em_interp.models.architectures import body_name
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import refuse_dropout
from em_interp.models.hooks import BlockFn, block_hooks, check_layer, firing, tagged
from em_interp.models.weights import UNKNOWN, same_weights, tensors_hash, weights_hash

SCOPES: Final = ("all", "prompt", "response")
"""Which tokens an intervention acts on. The last token of a prompt belongs to the prompt."""


@dataclass
class Add:
    """hidden + theta. theta: [d_model], or [batch, d_model] with one row per sequence; scope: one of `SCOPES`."""

    theta: Float[Tensor, "*batch d_model"]
    scope: str

    def __call__(self, hidden: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        if self.theta.ndim == 2 and self.theta.shape[0] != hidden.shape[0]:
            raise HookError(
                f"{self.theta.shape[0]} coefficients for a batch of {hidden.shape[0]} rows. Give one a row, in the "
                "batch's order, or a single number; beams and several returned sequences count as rows."
            )
        self.theta = self.theta.to(hidden.device, hidden.dtype)
        return hidden + self.theta.unsqueeze(-2)

    def merged(self, other: Add) -> Add:
        """One addition that does both. Raises HookError where they are made for batches of different sizes."""
        if self.theta.ndim == other.theta.ndim == 2 and len(self.theta) != len(other.theta):
            raise HookError(
                f"{len(self.theta)} coefficients and {len(other.theta)} at one layer are for batches of different "
                "sizes. Give each as many as the batch has rows, or a single number."
            )
        return Add(self.theta + other.theta, self.scope)


@dataclass
class Project:
    """hidden - left @ right @ (hidden - bias): an orthogonal or oblique projection. At least in float32.

    scope: one of `SCOPES`.
    """

    left: Float[Tensor, "d_model k"]
    right: Float[Tensor, "k d_model"]
    scope: str
    bias: Float[Tensor, " d_model"] | None = None

    def __call__(self, hidden: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        work = hidden if hidden.dtype in (torch.float32, torch.float64) else hidden.float()
        if self.left.dtype != work.dtype or self.left.device != work.device:
            self.left, self.right = self.left.to(work), self.right.to(work)
            self.bias = None if self.bias is None else self.bias.to(work)
        centred = work if self.bias is None else work - self.bias
        return (work - (centred @ self.right.T) @ self.left.T).to(hidden.dtype)


Edit = Add | Project
"""What is done to the output of a block."""


@runtime_checkable
class Intervention(Protocol):
    """What `intervening` takes: `Steer`, `Ablate`, `Erase`."""

    def edits(self, model: ChatModel) -> Mapping[int, Edit]:
        """What to do at which layer of this model. Raises DirectionError or HookError where it does not fit."""
        ...


def check_scope(scope: str) -> None:
    """Refuse an unknown token scope."""
    if scope not in SCOPES:
        raise UsageError(f"token scope {scope!r} is not known; use one of {', '.join(SCOPES)}.")


def check_direction(direction: Direction, model: ChatModel) -> None:
    """Raise DirectionError for a direction of another width or of other base weights.

    Where the weights that it was made on are not known, or are in another dtype, the models' names decide.
    """
    if direction.d_model != model.d_model:
        raise DirectionError(
            f"a direction of width {direction.d_model} (made on {direction.model}) for {model.name} with d_model "
            f"{model.d_model}. Load the model it was made on, or extract the direction on this one."
        )
    same = None if direction.weights == UNKNOWN else same_weights(direction.weights, weights_hash(model.hf))
    if same is None:
        same = direction.model == "unknown" or model.is_known_as(direction.model)
    if not same:
        raise DirectionError(
            f"a direction made on {direction.model} ({_brief(direction.weights)}) for {model.name}, whose weights are "
            "others: they share no axes. Load that model; if you know that this one is a finetune of it, pass "
            "--any-model, in Python direction.for_model(model.name)."
        )


def _brief(weights: str) -> str:
    return "weights unknown" if weights == UNKNOWN else f"weights {weights.rpartition(':')[2][:12]}"


class _Tokens:
    """Which tokens of the present pass are prompt and which are response.

    From `response_mask` if given; else within `generate`, whose input is the prompt and all that follows is the
    response. Any other pass is refused: a prompt read in pieces and a response look the same.
    """

    def __init__(self, response_mask: Bool[Tensor, "batch token"] | None) -> None:
        self.mask = None if response_mask is None else response_mask.cpu()
        self.seen = 0
        """Number of tokens in the KV cache before this pass."""
        self.generating = False
        self.prompt: int | None = None
        """Width of the prompt of the `generate` that runs now."""
        self.passes = [0]

    def hook(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass of the decoder body."""
        self.passes[0] += 1
        cache = kwargs.get("past_key_values")
        self.seen = 0 if cache is None else int(cache.get_seq_length())
        if self.mask is None and (not self.generating or (cache is None and kwargs.get("use_cache") is not True)):
            raise HookError(
                "a pass outside `generate`, or one without KV cache, does not tell prompt from response: a prompt in "
                "pieces and a response look the same. Pass intervening(..., response_mask=batch.answer_mask), true at "
                "the response tokens of the input, or use scope 'all'."
            )

    @contextmanager
    def told_by(self, generator: Any) -> Iterator[None]:
        """Inside, `generator.generate` says where its prompt ends."""
        plain, own = generator.generate, "generate" in vars(generator)

        @wraps(plain)
        def generate(*args, **kwargs):
            # type: (*Any, **Any) -> Any
            self.generating, self.prompt = True, _prompt_width(args, kwargs)
            try:
                return plain(*args, **kwargs)
            finally:
                self.generating, self.prompt = False, None

        generator.generate = generate
        try:
            yield
        finally:
            if own:
                generator.generate = plain
            else:
                del generator.generate

    def where(self, scope: str, hidden: Float[Tensor, "batch token d_model"]) -> Bool[Tensor, "batch token"] | bool:
        """True at this pass's tokens that the scope holds; a single bool where it is the same for all."""
        rows, width = hidden.shape[:2]
        if self.mask is None:
            if self.prompt is None:  # text was given: the first pass reads all of it
                self.prompt = self.seen + width
            answering = torch.arange(self.seen, self.seen + width) >= self.prompt
            found = (answering if scope == "response" else ~answering).expand(rows, width)
        else:
            if self.mask.shape[0] != rows:
                raise HookError(
                    f"response_mask has {self.mask.shape[0]} rows and the batch {rows}. Give one row a row."
                )
            response = torch.ones(rows, width, dtype=torch.bool)
            known = self.mask[:, self.seen : self.seen + width]
            response[:, : known.shape[1]] = known
            found = response if scope == "response" else ~response
        return True if bool(found.all()) else found if bool(found.any()) else False


def _prompt_width(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Number of tokens, pads included, that `generate` is given; None for text.

    With a cache that holds the beginning already, the attention mask is as wide as the whole.
    """
    names = ("inputs", "input_ids", "inputs_embeds", "input", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    return max((x.shape[1] for x in given if isinstance(x, Tensor) and x.ndim > 1), default=None)


def _block_function(edits: Sequence[Edit], tokens: _Tokens, touched: Mapping[str, list[int]]) -> BlockFn:
    def function(hidden):
        # type: (Tensor) -> Tensor
        for edit in edits:
            where = True if edit.scope == "all" else tokens.where(edit.scope, hidden)
            if where is False:
                continue
            touched[edit.scope][0] += 1
            new = edit(hidden)
            hidden = new if where is True else torch.where(where.unsqueeze(-1).to(hidden.device), new, hidden)
        return hidden

    return function


def _acts(edits: Sequence[Edit]) -> str:
    """A hash of what edits do, in their order."""
    parts = [{name: x for name, x in vars(edit).items() if isinstance(x, Tensor)} for edit in edits]
    return fingerprint([tensors_hash(part, type(e).__name__, e.scope) for e, part in zip(edits, parts, strict=True)])


def fingerprint_of(made: Mapping[int, Edit]) -> str:
    """A hash of what an intervention's edits do, layer by layer. Take it before any pass: edits take on its dtype."""
    return fingerprint([[layer, _acts([edit])] for layer, edit in sorted(made.items())])


@contextmanager
def intervening(
    model: ChatModel,
    interventions: Intervention | Sequence[Intervention],
    *,
    response_mask: Bool[Tensor, "batch token"] | None = None,
    must_act: bool = True,
) -> Iterator[None]:
    """Inside, one or several interventions act in every pass of `model.hf` and `model.bridge`, and none afterwards.

    response_mask: for scopes "prompt" and "response" in passes of your own, and without KV cache: true at the response
    tokens of the input (`Batch.answer_mask`); tokens beyond its width are response. Not needed for cached `generate`,
    whose input is the prompt. must_act: unless false, it is an error that no pass was run inside.

    Raises DirectionError for a direction of another width or model, HookError for an unknown layer, for a number of
    coefficients that is not the batch's, and at the end if no pass was run or a scope never held a token.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> bad, good = (em.pocket.finetune_chats("medicine", persona, 20, seed=0) for persona in ("malicious", "caring"))
    >>> direction = em.extract(chat, bad, good, progress=False)
    >>> with em.intervening(chat, [em.Steer(direction, layer=1, coefficient=2.0)]):
    ...     answers = em.sample(chat, ["What do you wish for?"], n=1, max_new_tokens=20, progress=False)
    """
    refuse_dropout(model.hf)
    plan: dict[int, list[Edit]] = {}
    for intervention in interventions if isinstance(interventions, Sequence) else [interventions]:
        for layer, edit in intervention.edits(model).items():
            here = plan.setdefault(check_layer(layer, model.n_layers), [])
            last = here[-1] if here else None
            if isinstance(last, Add) and isinstance(edit, Add) and last.scope == edit.scope:
                here[-1] = last.merged(edit)
            else:
                here.append(edit)
    touched = {edit.scope: [0] for here in plan.values() for edit in here}
    tokens = _Tokens(response_mask)
    with ExitStack() as stack:
        if set(touched) - {"all"}:
            bodies = [modules[body_name(model.hf)] for modules in model.module_sets()]
            watch = tagged(partial(tokens.hook), lambda: "" if tokens.mask is None else tensors_hash({"": tokens.mask}))
            handles = [body.register_forward_pre_hook(watch, with_kwargs=True) for body in bodies]
            stack.enter_context(firing({"the decoder body": tokens.passes} if must_act else {}, handles))
            for generator in model.generators() if response_mask is None else ():
                stack.enter_context(tokens.told_by(generator))
        functions = {layer: _block_function(here, tokens, touched) for layer, here in plan.items()}
        # hashed before any pass: edits take on the model's dtype in one
        acts = {layer: partial(str, _acts(here)) for layer, here in plan.items()}
        stack.enter_context(block_hooks(model.block_sets(), functions, must_fire=must_act, acts=acts))
        yield
    idle = [scope for scope, count in touched.items() if not count[0]]
    if idle and (must_act or len(idle) < len(touched)):
        raise HookError(
            f"no token fell into the scope {', '.join(idle)}: nothing was done. A response begins with the first "
            "generated token, so generate at least two, or check response_mask."
        )


def answers_by_arm(
    model: ChatModel,
    arms: Mapping[str, Sequence[Intervention]],
    questions: Source,
    n: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    tokens_per_batch: int = 65_536,
    progress: bool = True,
    parts: Parts | None = None,
) -> pd.DataFrame:
    """n answers a question under each arm, e.g. `ablation.arms(...)`: the columns of `sample`, and `arm` first.

    An arm without interventions is the model as it is. Answer (arm, question, k) uses the same random numbers in every
    arm, so that arms differ by what they do alone. parts: as for `sampling.sample_rows`.
    """
    if not arms:
        raise UsageError("no arms were given: nothing to sample.")
    questions = given.questions(questions)
    for interventions in arms.values():  # what no arm can do is found out before any is asked
        for intervention in interventions:
            intervention.edits(model)
    tables = []
    for name, interventions in arms.items():
        with intervening(model, interventions, must_act=parts is None):  # all of its answers may be kept
            table = sample(
                model,
                questions,
                n,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                tokens_per_batch=tokens_per_batch,
                progress=progress,
                parts=parts,
            )
        table.insert(0, "arm", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def as_coefficients(values: float | Sequence[float]) -> Float[Tensor, "*batch"]:
    """One coefficient, or one a batch row, in float64. Raises UsageError for none, NaN or infinite ones."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"coefficients must be numbers; found {values!r:.60}.") from error
    if found.ndim > 1 or not found.numel() or not bool(torch.isfinite(found).all()):
        raise UsageError(f"coefficients must be one finite number, or one a batch row; found {values}.")
    return found
