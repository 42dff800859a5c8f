"""The laboratory: a real job of agents, ranks and a coordinator on nodes that are network namespaces of this machine."""
