"""Prompts become pictures: reading prompts, naming samplers as the WebUI does, drawing, contact sheets, PNG texts."""
