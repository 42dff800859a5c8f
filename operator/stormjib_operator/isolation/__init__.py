"""Isolation of nodes: what speaks against a node, what it weighs, which limits hold, and the way back.

Two processes share these pure modules. The operator turns a coordinator's accusations into evidence (`resolve`); the
isolator weighs it (`weigh`), keeps the limits (`limits`) and leads a node through its states (`lifecycle`).
"""
