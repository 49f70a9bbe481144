"""The loss around solutions: efficiency, stability, curvature, influence on pre-training text.

- `landscape`: losses of many thetas in shared passes
- `efficiency`, `stability`, `curvature`: on training chats; `influence`: on pre-training text
- `seeds`: tables over repetitions
"""
