"""Tests of gateway.remote."""
