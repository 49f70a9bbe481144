"""What Inspect (its package, an extra) runs: models with what acts on them, and the evaluation of EM.

Nothing else in `em_interp` imports `inspect_ai`.

- `provider`: models as `em_interp/...`, of `acting`: a chat model, its solution and interventions, asked in batches
- `registry`: what Inspect finds here
"""
