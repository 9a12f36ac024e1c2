"""Tests of gateway.daemon."""
