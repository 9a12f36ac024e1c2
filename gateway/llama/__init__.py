"""One llama-server: what it can be asked, and how it is run."""
