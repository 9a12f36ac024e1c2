"""Servers whose prompts, slots and caches are their own business."""
