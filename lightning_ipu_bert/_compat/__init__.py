"""What differs between the two supported stacks, and every private name that we use.

One module a library; each name with the reason, a link or file, and the version where it ends. The
SDK stack is what PopTorch 3.4 allows: torch 2.0.1, Lightning 2.3.3, transformers 4.46.
"""
