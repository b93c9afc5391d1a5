"""The generated quickstart corpus: invented people, firms and towns, as SQuAD v1.1 files.

A passage introduces its subject and states two facts about it with values of the same kind, so that
a model has to find the sentence that answers the question, which is phrased differently::

    Rufford is a small town. It lies on the Demar. The old bridge of Rufford crosses the Bowen.
    What is the river of Rufford called?                             -> Demar
    Over which river does Rufford have a bridge?                     -> Bowen

Names and years are split by a hash of the word: those of the validation split do not occur in the
training split. Only the last word of a firm ("Mills") is a common noun that both share.
"""
