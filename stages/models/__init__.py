"""Builders of the networks: open_clip and diffusers classes behind settings."""
