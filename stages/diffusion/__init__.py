"""Noise schedules, objectives, the CLIP loss, samplers and guidance."""
