"""Text to batches: documents, tokenizer, shards, references, rows. Knows nothing of models."""
