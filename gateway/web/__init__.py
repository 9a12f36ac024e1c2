"""The door: who may come in, and what HTTP makes of it."""
