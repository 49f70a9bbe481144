"""What is done with a direction: steering, ablation, edited weights, transfer between finetunes.

- `intervening`: the context in which interventions act; `steering`, `ablation`: `Steer`, `Ablate`, `Erase`
- `orthogonalise`: a direction taken out of the weights; `transfer`: of one finetune's direction to another
- `judged`: what judged answers of any of them say, as table and figure
"""
