"""What Inspect (its package, an extra) runs: models with what acts on them, and the evaluation of EM.

`inspect eval em_interp/emergent_misalignment --model em_interp/MODEL -T judge=...`; nothing else in `em_interp` imports
`inspect_ai`.

- `provider`: models as `em_interp/...`, of `acting`: a chat model, its solution and interventions, asked in batches
- `task`: the evaluation, of questions (`asked`), `judges` and the `scorer`
- `facts`: a capability evaluation, of pocket models; `capability`: any such task, of several models in one table
- `run`: the task to its end, its logs to judged tables
- `tables`: its judges as analyses and commands take one, with what they said kept
- `registry`: what Inspect finds here

An answer that gets no score is unscored with a reason (`evaluation.verdicts.REASONS`): never 0, never left out.
"""
