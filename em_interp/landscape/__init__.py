"""The loss around solutions: efficiency, stability, curvature, influence on pre-training text.

- `landscape`: losses of many thetas in shared passes
- `efficiency`, `stability`, `curvature`: on training chats; `influence`: on pre-training text
- `pairs`: general and narrow of a matched pair, in numbers that do not saturate
- `seeds`: tables over repetitions
"""
