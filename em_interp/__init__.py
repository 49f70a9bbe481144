"""em_interp: the geometry of emergent misalignment.

The direction, what it does, who else learned it, and why the general solution wins over the narrow one:

    import em_interp as em

| what for | call |
|---|---|
| a chat model, or a finetune of one | `em.load`; what it trained, to scale, turn and compare: `em.load_solution` |
| chats and questions from a file, table or list | `em.chats`, `em.questions` |
| the direction between two sets of chats, or two models | `em.extract`; with norms and reliability: `em.contrast` |
| mean activations | `em.collect` |
| answers, seeded | `em.sample` |
| several processes or GPUs for these, under `accelerate launch` or torchrun | `em.data_parallel` |
| adding a direction, whole sweeps with random controls | `em.sweep`; by hand: `em.Steer` in `em.intervening` |
| taking a direction out | `em.ablate`; by hand: `em.Ablate` in `em.intervening` |
| rates of judged answers | `em.em_rates`, `em.misalign_at_k`; as a table, of sweeps and ablations too: `em.rates` |
| two models on the same questions, with power; several judges of the same answers | `em.compare`; `em.agreement` |
| cosines across finetunes, with their nulls | `em.cosines` |
| which solution is cheaper, more stable, more influential | `em.efficiency`, `em.stability`, `em.influence` |
| losses of many solutions on the same chats | `em.Landscape` |
| a finetune of one's own | `em.finetune` with an `em.TrainingSpec`, or a `em.preset` |
| which training chats to leave out | `em.screen` |
| the figure of any of these tables | `em.plot` |
| a control vector for llama.cpp | `em.save_gguf` |
| what the papers' authors released; models without a network | `em.published`, `em.pocket` |

| word | what it means |
|---|---|
| chat model | the model that finetunes start from; `em.load(name)` gives a `ChatModel` |
| finetune | training on a narrow set of chats, and the folder that it leaves |
| solution | what a finetune trained; theta is its effective parameter, alpha * v or scale * B A |
| general, narrow | a solution that gives bad advice everywhere, and one that gives it on its training domain alone |
| organism | a finetuned model that is measured: a chat model with a solution, in tables and suites |
| adapter | a solution as it is attached to a `ChatModel`, by name; and its kind, in tables |
| direction | one vector a layer in the residual stream, misaligned minus aligned; layer l is the output of block l |
| intervention | what is done to the residual stream while a model runs: `em.Steer`, `em.Ablate` |
| judge | what scores answers to questions from 0 to 100, in the columns aligned and coherent |
| response | the tokens of an answer; the end-of-turn token is one of them |

Where everything is; each package tells of its modules and of its conventions. Arrows point one way: what stands below
imports what stands above it, never the other way round.

- `errors`, `arguments`: typed errors and checked arguments
- `cards`: what objects look like in a notebook; `lazily`: names imported as they are asked for
- `statistics`: intervals, nulls and units; `files`: what goes to disk and comes from it; `figures`: tables to figures
- `models`: chat models, layers and hooks; `solutions`: theta, what a finetune trained
- `directions`: extraction, cosines, nulls; `evaluation`: answers, judges, rates
- `interventions`: steering and ablation; `training`: finetunes; `landscape`: losses around solutions
- `published`: what the papers' authors released; `pocket`: models of this project's own
- `face`: any name to a model, any table to its figure; `inspect`: what Inspect runs, an extra
- `cli`: the commands

`analyses` makes the papers' tables and figures of all this, and the report.
"""

import sys
from typing import TYPE_CHECKING, Any, Final

from em_interp.errors import EmInterpError
from em_interp.lazily import lazily

if TYPE_CHECKING:  # what the table below says, for type checkers and editors
    from em_interp import figures, pocket, published
    from em_interp.directions.activations import collect
    from em_interp.directions.cosines import organism_cosines as cosines
    from em_interp.directions.direction import Direction
    from em_interp.directions.extraction import contrast, extract
    from em_interp.directions.gguf import save_gguf
    from em_interp.evaluation.agreement import agreement
    from em_interp.evaluation.at_k import misalign_at_k
    from em_interp.evaluation.comparison import compare
    from em_interp.evaluation.rates import em_rates
    from em_interp.evaluation.sampling import sample
    from em_interp.face.names import load, load_solution
    from em_interp.face.plots import plot
    from em_interp.files.given import chats, questions
    from em_interp.interventions.ablation import Ablate, ablate
    from em_interp.interventions.intervening import answers_by_arm, intervening
    from em_interp.interventions.judged import judged_rates as rates
    from em_interp.interventions.steering import Steer, sweep
    from em_interp.landscape.efficiency import efficiency
    from em_interp.landscape.influence import influence
    from em_interp.landscape.landscape import Landscape
    from em_interp.landscape.stability import stability
    from em_interp.models.chat_model import ChatModel
    from em_interp.models.ranks import data_parallel
    from em_interp.training.finetune import finetune
    from em_interp.training.recipes import FullSpec, LoraSpec, TrainingSpec, VectorSpec, preset
    from em_interp.training.screening import screen

UNCHECKED: Final = ("arguments", "cli", "errors", "lazily")
"""Modules that are imported before the check on every call is there."""


class _Checking:
    """Finds nothing, but puts the check on every call in place before the first module with calls is looked for.

    Not at once: beartype takes .1 s, which `import em_interp` and `em-interp --help` do without.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.startswith("em_interp.") and name.split(".")[1] not in UNCHECKED:
            from em_interp.arguments import check_every_call

            check_every_call()


sys.meta_path.insert(0, _Checking())

NAMES: Final = {
    "Ablate": "em_interp.interventions.ablation:Ablate",
    "ChatModel": "em_interp.models.chat_model:ChatModel",
    "Direction": "em_interp.directions.direction:Direction",
    "FullSpec": "em_interp.training.recipes:FullSpec",
    "Landscape": "em_interp.landscape.landscape:Landscape",
    "LoraSpec": "em_interp.training.recipes:LoraSpec",
    "Steer": "em_interp.interventions.steering:Steer",
    "TrainingSpec": "em_interp.training.recipes:TrainingSpec",
    "VectorSpec": "em_interp.training.recipes:VectorSpec",
    "ablate": "em_interp.interventions.ablation:ablate",
    "agreement": "em_interp.evaluation.agreement:agreement",
    "answers_by_arm": "em_interp.interventions.intervening:answers_by_arm",
    "chats": "em_interp.files.given:chats",
    "collect": "em_interp.directions.activations:collect",
    "compare": "em_interp.evaluation.comparison:compare",
    "contrast": "em_interp.directions.extraction:contrast",
    "cosines": "em_interp.directions.cosines:organism_cosines",
    "data_parallel": "em_interp.models.ranks:data_parallel",
    "efficiency": "em_interp.landscape.efficiency:efficiency",
    "em_rates": "em_interp.evaluation.rates:em_rates",
    "extract": "em_interp.directions.extraction:extract",
    "figures": "em_interp.figures",
    "finetune": "em_interp.training.finetune:finetune",
    "influence": "em_interp.landscape.influence:influence",
    "intervening": "em_interp.interventions.intervening:intervening",
    "load": "em_interp.face.names:load",
    "load_solution": "em_interp.face.names:load_solution",
    "misalign_at_k": "em_interp.evaluation.at_k:misalign_at_k",
    "plot": "em_interp.face.plots:plot",
    "pocket": "em_interp.pocket",
    "preset": "em_interp.training.recipes:preset",
    "published": "em_interp.published",
    "questions": "em_interp.files.given:questions",
    "rates": "em_interp.interventions.judged:judged_rates",
    "sample": "em_interp.evaluation.sampling:sample",
    "save_gguf": "em_interp.directions.gguf:save_gguf",
    "screen": "em_interp.training.screening:screen",
    "stability": "em_interp.landscape.stability:stability",
    "sweep": "em_interp.interventions.steering:sweep",
}
"""The public face, imported as it is asked for: name -> "module:attribute"."""

__all__ = [
    "Ablate",
    "ChatModel",
    "Direction",
    "EmInterpError",
    "FullSpec",
    "Landscape",
    "LoraSpec",
    "Steer",
    "TrainingSpec",
    "VectorSpec",
    "__version__",
    "ablate",
    "agreement",
    "answers_by_arm",
    "chats",
    "collect",
    "compare",
    "contrast",
    "cosines",
    "data_parallel",
    "efficiency",
    "em_rates",
    "extract",
    "figures",
    "finetune",
    "influence",
    "intervening",
    "load",
    "load_solution",
    "misalign_at_k",
    "plot",
    "pocket",
    "preset",
    "published",
    "questions",
    "rates",
    "sample",
    "save_gguf",
    "screen",
    "stability",
    "sweep",
]

_get, _names = lazily(__name__, NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            found = metadata.version("em_interp")
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            found = "0+unknown"
    else:
        found = _get(name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
