"""What may be compared: solutions of one model, in one space, and the chat model as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from em_interp.errors import SolutionError, UsageError
from em_interp.files.base_names import refuse_other_base
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import has_our_hooks
from em_interp.solutions.base import Solution


def refuse_other_models(model: ChatModel, solutions: Iterable[Solution]) -> None:
    """Raise SolutionError unless every solution that names its base was trained on `model`.

    Bases are compared as `ChatModel.add_adapter` does.
    """
    for solution in solutions:
        error = SolutionError(
            f"a solution trained on {solution.base} cannot be compared on {model.name}. Load {solution.base}, or, "
            f"if it is the same model under another name, dataclasses.replace(solution, base={model.name!r})."
        )
        refuse_other_base(solution.base, model.names, error)


def check_comparable(
    solutions: Mapping[str, Solution], model: ChatModel | None = None, *, may_be_zero: bool = False
) -> None:
    """Refuse solutions of different models, of different places in one model, zero ones, and none at all.

    A solution that does not record its base is taken to belong. Raises SolutionError that names both sides.
    """
    if not solutions:
        raise SolutionError("no solutions were given. Pass at least one steering vector or LoRA adapter.")
    known, whose = (model.name if model is not None else None), "the model in hand"
    first = next(iter(solutions))
    space = dict(solutions[first].space)
    for name, solution in solutions.items():
        if solution.base and known is None:
            known, whose = solution.base, f"the base of {name}"
        error = SolutionError(
            f"{name} was trained on {solution.base}, but {whose} is {known}. "
            "Compare solutions of one model, on that model."
        )
        refuse_other_base(solution.base, model.names if model is not None else (known or "",), error)
        if not (may_be_zero or solution.norm > 0):
            raise SolutionError(
                f"{name} has theta = 0, which has no direction. Take a checkpoint after training began."
            )
        if dict(solution.space) != space:
            odd = sorted(set(solution.space.items()) ^ set(space.items()))[0]
            raise SolutionError(
                f"{name} and {first} do not live in one space: {odd[0]} {odd[1]} is in only one of them. "
                "Compare solutions of the same kind, layer and modules."
            )


def refuse_zero(solutions: Mapping[str, Solution]) -> None:
    """Refuse theta = 0, which cannot be scaled to a norm or turned, and no solutions at all. Raises SolutionError."""
    if not solutions:
        raise SolutionError("no solutions were given. Give {name: solution}, with at least one.")
    for name, solution in solutions.items():
        if not solution.norm > 0:
            raise SolutionError(
                f"the solution {name!r} is zero: it has no norm to scale and nothing is orthogonal to it. Give a "
                "trained solution; theta = 0 is the chat model."
            )


def check_bare(model: ChatModel) -> None:
    """Refuse a model that something is attached to: its answers would not be the chat model's."""
    if has_our_hooks(model.hf):
        raise UsageError(
            f"a solution or an intervention is attached to {model.name}, so it is not the chat model now. Call this "
            "outside that context."
        )


def check_inside_blocks(solution: Solution) -> None:
    """Refuse LoRA on modules that lie in no block, such as the output head."""
    if solution.outside_blocks:
        raise SolutionError(
            f"the adapter touches {solution.outside_blocks[0]}, which lies in no block: what comes after the blocks "
            "must be the chat model's own here. Use an adapter of the blocks alone."
        )
