"""Readers for what the papers' authors released. Nothing here writes to, or ships, the released files.

- `scan`: everything below a folder, found and read
- `activations`, `runs`, `judged`, `questions`, `torchfile`: single files; `fetch`: getting them

The files carry **no licence**, so they must not be redistributed: load them from your own copy, do not commit them or
figures made of them, and cite the papers. Mean activations and judged answers are from `annasoligo/EM_interp` (the
first author's repository; this package only shares its name), training runs from `edwardbturner/training-lens-web`,
questions and judges from `clarifying-EM/model-organisms-for-EM`, adapters and vectors from the Hugging Face
organisation `ModelOrganismsForEM`. `em-interp fetch --data released` gets them, and tells exactly what could not be
had.

Any folder of the same formats works, in any arrangement: files are found by name pattern and format, not by the names
of particular runs. With part of the data missing, what can be made is made, and the rest is named with where to get it.
Pickles that carry code are refused, never run.

```python
import em_interp as em

data = em.published.scan("released")  # data.problems: what was refused, each with its remedy
splits = {split.label: split for split in data.splits}  # FOLDER/SPLIT, the names on disk
nine = splits["q14b_bad_med_bad_med_dpR1_15-17_21-23_27-29/all"]  # the 9-adapter finetune
r32 = splits["q14b_bad_med_R32/R32"]

v, w = nine.direction("data-diff"), r32.direction("data-diff")  # the papers' mean-diff, 48 layers x 5120
print(v.norms()[24])  # 10.36
print(v.cosine(nine.direction("data-diff-in-chat"))[24])  # 0.980: the same texts, read in the chat model

table = em.cosines({nine.label: v, r32.label: w})  # one row a layer: cosine, null_sd, p_value
print(table["cosine"].min())  # 0.815, at layer 26
em.plot(table).write_html("cosine.html")  # or .show(); the band is what random directions give

v.unit().save("direction.safetensors")  # layers, model, hook point, token scope and sources travel with it
again = em.Direction.load("direction.safetensors", model="Qwen2.5-14B", n_layers=48, d_model=5120)
```

The whole story, section by section, is in `notebooks/published_qwen14b.ipynb`.
"""

from em_interp.published.activations import (
    DIFFERENCES,
    ActivationCell,
    ActivationSplit,
    model_of,
    read_activation_cell,
    read_activation_folder,
)
from em_interp.published.judged import read_judged_csv
from em_interp.published.questions import JudgePrompt, read_judges
from em_interp.published.runs import LoraCheckpoint, Run, TrainingLog, read_lora_checkpoint, read_run, solution_at
from em_interp.published.scan import JudgedSet, PublishedData, StoredPCA, scan

__all__ = [
    "DIFFERENCES",
    "ActivationCell",
    "ActivationSplit",
    "JudgePrompt",
    "JudgedSet",
    "LoraCheckpoint",
    "PublishedData",
    "Run",
    "StoredPCA",
    "TrainingLog",
    "model_of",
    "read_activation_cell",
    "read_activation_folder",
    "read_judged_csv",
    "read_judges",
    "read_lora_checkpoint",
    "read_run",
    "scan",
    "solution_at",
]
