"""A folder of pictures becomes batches: read once, checked, fitted into buckets, kept as latents."""
