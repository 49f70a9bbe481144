"""What goes to disk and comes from it: writes, manifests, resumable tables, texts, the folders of adapters."""
