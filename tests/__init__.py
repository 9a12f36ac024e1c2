"""Tests; they mirror gateway/."""
