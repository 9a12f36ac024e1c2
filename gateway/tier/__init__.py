"""One model that calls are sent to."""
