"""Why EM emerges: experiments of many finetunes of one world, or of many worlds. They ship as tables.

What each is to show was written down before its runs: `preregistered.md`. `em-interp reproduce --recompute` runs them
again.

- `pretraining`: does EM need a trait to switch on? Other pre-training, the same finetunes
- `controls`: those of Betley et al., row by row beside the published rates
- `mitigations`: what prevents or removes EM, its cost, and what comes back in training's form
"""
