"""Speed and memory beside the alternatives, measured in one run, and how intervals cover. Each writes a table.

- `extraction`, `landscape`, `steering`, `data_parallel`: ratios side by side, with a manifest; `common`: what
  they share
- `learning_rates`: how gently organisms can be trained
- `capability`: what steering and ablation cost, through Inspect
- `coverage`: of intervals, by simulation: `coverage_scenario`, `coverage_rates`, `coverage_judged`,
  `coverage_losses`, `coverage_geometry`, and `coverage_old` for the bootstrap that is usual
"""
