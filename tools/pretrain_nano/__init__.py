"""Builds the emoji data set and trains the embedded base `nano` on it; see README.md beside this file."""
