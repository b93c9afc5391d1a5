"""The corpus that comes with the package: invented people, firms and towns, as SQuAD v1.1 files.

A passage introduces its subject and tells two things about it with values of the same kind, so
that a reader has to find the sentence that says what the question asks for, in other words::

    Rufford is a small town. It lies on the Demar. The old bridge of Rufford crosses the Bowen.
    What is the river of Rufford called?                             -> Demar
    Over which river does Rufford have a bridge?                     -> Bowen

Names and years are split by a hash of the word: those of the validation split never occur
in the training split. Only the last word of a firm ("Mills") is a common noun that both share.
"""
