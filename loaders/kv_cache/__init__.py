"""The KV cache in blocks: which sequence holds which, which are shared, and the budget of all pools."""
