"""Silent corruption, judged: norms before mixing, votes of replicas, spikes, replays. Pure; knows no tensors."""
