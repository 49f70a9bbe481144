"""theta: what a finetune trained, as one thing that can be scaled, perturbed, attached and compared.

- `base`: what a solution must offer; `load`: any folder to the solution in it; `space`: what may be compared
- `steering_vector`, `lora`, `dora`, `weight_delta`: the kinds
- `files`: names of modules in folders

theta is a steering vector, LoRA (rank-stabilised, ranks and alphas by module, on fused projections), DoRA, or a full
finetune: finetuned minus base weights over every tensor, read from its files one by one. DoRA and full finetunes mean
something beside their base only: `em_interp.load_solution(FINETUNE, base=model)`. As models, adapters with retrained
tokens are taken besides. Only what gives PEFT's own logits is accepted.

**Norms** are of the effective parameter theta: alpha * v for a steering vector, scale * B A for LoRA (scale alpha / r,
or alpha / sqrt(r) with rsLoRA), the change of the weights for DoRA and full finetunes. `raw_norm` in tables is that of
the vector as stored.

A new kind is a class of `Solution` in a file here, and its line in `load.KINDS`.
"""
