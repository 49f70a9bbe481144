"""What is done with a direction: steering, ablation, edited weights, transfer between finetunes."""
