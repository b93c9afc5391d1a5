"""Operations for CPUs with their own backward: dropout, and the two halves of a BERT layer."""

from lightning_ipu_bert.ops.dropout import Dropout

__all__ = ["Dropout"]
