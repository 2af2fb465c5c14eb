"""Looking at a run: pure readers of its directory, which need neither torch nor transformers nor numpy."""
