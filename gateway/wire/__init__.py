"""The Messages API as plain values: no Twisted, no I/O."""
