"""Why EM emerges in the pocket world, and what prevents it: experiments of many finetunes, each of them an arm.

- `arms`: the kit: training an arm, asking it in one or several ways, the table of all of them
- `pretraining`: worlds whose pre-training was changed, finetuned alike
- `controls`: those of Betley et al.: what was asked for, triggers, formats, how many and how many bad examples
- `mitigations`: what prevents or removes EM, and what of it is only hidden
"""
