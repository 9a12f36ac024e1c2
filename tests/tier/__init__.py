"""Tests of gateway.tier."""
