"""DALL·E 2 itself: what is trained, how it is sampled, how it is judged."""
