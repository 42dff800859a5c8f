"""Fault laboratory: injects faults of known kind and place, and proves that each one fired.

The standard library only, and nothing of ours: the command runs in a job's own pods by `kubectl exec`, whatever their image.
What it says of a fault (`words.Truth`) is in the words of `stormjib_health.verdict`, written out, so that the judge and the
culprit share no code.
"""
