"""End to end: real servers, real clients."""
