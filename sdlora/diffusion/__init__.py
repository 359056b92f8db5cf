"""Pure functions from the papers: noise schedule, noise, timesteps, losses. Imports nothing but torch."""
