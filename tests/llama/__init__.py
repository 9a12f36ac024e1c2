"""Tests of gateway.llama."""
