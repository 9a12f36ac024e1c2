"""Decisions: values in, values out.  No Twisted, no I/O."""
