"""Models for every verb: located, opened, quantized, started from an adapter."""
