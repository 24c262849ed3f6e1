"""Replay: what proves that a run was trained as its checkpoints say.

`replay` trains again from a checkpoint and compares; `bisect` finds the first place at which two runs differ;
`differences` compares two states leaf by leaf.
"""
