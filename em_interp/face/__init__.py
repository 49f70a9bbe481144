"""What stands behind `import em_interp as em` alone, above all packages.

- `names`: any name to a model, or to what a finetune trained; `plots`: any table to its figure
"""
