"""The commands of ``claudegw``, beside the running gateway and not in it."""
