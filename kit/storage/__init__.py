"""What stands on the disk: run directories, manifests, folders that are complete or absent, safetensors headers."""
