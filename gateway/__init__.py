"""The gateway between Claude Code and the llama-servers of one machine."""
