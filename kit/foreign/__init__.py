"""Reads the keys of other tools: TRL and transformers, accelerate, Axolotl and LLaMA-Factory."""
