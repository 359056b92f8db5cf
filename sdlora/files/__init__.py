"""LoRA files, in and out: what is written is what other programs load; what is read is checked before it is used."""
