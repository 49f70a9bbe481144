"""Hostile arguments for every public function and every command. Run without the tests' import hook, as users run."""
