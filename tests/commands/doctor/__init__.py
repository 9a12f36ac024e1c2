"""Tests of `gateway.commands.doctor`."""
