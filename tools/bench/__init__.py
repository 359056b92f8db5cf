"""Measures sdlora's training step against a loop as diffusers' example has it, side by side, in one run."""
