"""What a run takes, computed from its plan and the base's config.json: memory. Imports no torch."""
