"""Measures how well a LoRA learns a style, with judges trained for it; see README.md beside this file."""
