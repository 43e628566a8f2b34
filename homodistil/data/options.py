"""What can be asked of a corpus in a word, apart from the libraries that do it, so that `--help` is quick."""

from typing import Literal

Deduplicate = Literal["near", "exact", "none"]
"""Which of the documents that say the same go (choice.py)."""
Packing = Literal["documents", "sentences"]
"""Where sequences start (corpus.py)."""
