"""A DeepSpeed JSON: checked by itself, resolved for a run, mended in place."""
