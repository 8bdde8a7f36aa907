"""What a loaded model's layers are: linear layers by storage format, masks, rotary embeddings."""
