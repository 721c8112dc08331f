"""LoRA: adapters of many runs on one base model."""
