"""What differs between the two supported stacks, and every private name that we use.

One module a library, each with a list of the private names: where each is defined, why it is used,
and with which version that ends. The SDK stack is what PopTorch 3.4 allows: torch 2.0.1, Lightning
2.3.3, transformers 4.46.
"""
