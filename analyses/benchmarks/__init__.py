"""Speed and memory beside the alternatives, measured in one run. Each writes a table and a manifest."""
