"""What analyses are computed from: live models with their finetunes, pocket or from the hub."""
