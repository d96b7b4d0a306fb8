"""Jails over HTTP: `python -m fastgrpo_sandbox serve` answers in its own form and in those of three other sandboxes."""
