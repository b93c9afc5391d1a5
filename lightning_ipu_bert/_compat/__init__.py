"""Differences between the two supported stacks, and all uses of private names of libraries.

One module per library. Each lists the private names: where they are defined, why they are used, and
the version after which they are no longer needed. The SDK stack is the one that PopTorch 3.4
supports: torch 2.0.1, Lightning 2.3.3, transformers 4.46.
"""
