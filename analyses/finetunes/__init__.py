"""Analyses that ask live finetunes, or read what they are from their answers.

- `em_rates`, `steering`, `ablation`: what they answer; `cosines`: which directions they share
- `lora_scalars`: what the scalar of a rank-1 adapter tells apart
"""
