"""Measures what it costs to grow: more pictures, higher ranks, larger pictures, more layers."""
