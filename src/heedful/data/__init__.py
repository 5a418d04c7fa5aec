"""Data: text and synthetic tasks as rows of tokens.

`load_data` does everything; the other functions are its steps. Importing this package does not
import transformers or tokenizers.
"""

from heedful.data.dataset import Data, TokenDataset, load_data
from heedful.data.packing import by_document, count_bytes, pack
from heedful.data.tasks import TASKS, Task, answer_accuracy
from heedful.data.text import Text, load_text, read_validation
from heedful.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    byte_tokenizer,
    char_tokenizer,
    encode_documents,
    token_bytes,
    train_bpe,
)

__all__ = [
    "END_OF_TEXT",
    "TASKS",
    "ByteTokenizer",
    "Data",
    "Task",
    "Text",
    "TokenDataset",
    "answer_accuracy",
    "by_document",
    "byte_tokenizer",
    "char_tokenizer",
    "count_bytes",
    "encode_documents",
    "load_data",
    "load_text",
    "pack",
    "read_validation",
    "token_bytes",
    "train_bpe",
]
