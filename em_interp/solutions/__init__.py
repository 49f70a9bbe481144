"""theta: what a finetune trained, as one thing that can be scaled, perturbed, attached and compared."""
